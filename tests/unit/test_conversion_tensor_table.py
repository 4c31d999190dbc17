import dataclasses

import pytest
import torch

from megatron_sorted.conversion.hugging_face.config_settings import settings_of_config
from megatron_sorted.conversion.tensors.source import TensorInfo
from megatron_sorted.conversion.tensors.table import check_ours, check_theirs, tensor_table
from megatron_sorted.errors import CheckpointError
from tests.support.model_directories import FAMILIES, family_model


def infos(model):
    return {
        name: TensorInfo(tuple(tensor.shape), tensor.dtype)
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_holds_exactly_the_tensors_of_transformers(family, tied):
    model = family_model(family, tied)
    pairs = tensor_table(settings_of_config(model.config.to_dict(), family))
    theirs = {
        name: shape for pair in pairs for name, shape in zip(pair.theirs, pair.shapes, strict=True)
    }
    expected = {
        name: info.shape
        for name, info in infos(model).items()
        if not (tied and name == "lm_head.weight")
    }
    assert theirs == expected
    assert sum(len(pair.theirs) for pair in pairs) == len(theirs), "a name stands twice"


MODEL = family_model("qwen2")
PAIRS = tensor_table(settings_of_config(MODEL.config.to_dict(), "config.json"))


def changed(**changes):
    return {name: info for name, info in {**infos(MODEL), **changes}.items() if info is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.layers.2.mlp.up_proj.weight": None},
            "1 missing: model.layers.2.mlp.up_proj.weight",
        ),
        (
            {"model.layers.1.self_attn.k_proj.bias": None},
            "1 missing: model.layers.1.self_attn.k_proj.bias",
        ),
        ({"model.extra.weight": TensorInfo((2,), torch.float32)}, "1 unknown: model.extra.weight"),
        (
            {"model.norm.weight": TensorInfo((31,), torch.float32)},
            r"model.norm.weight has shape \[31\], and config.json makes it \[32\]",
        ),
        (
            {"model.norm.weight": TensorInfo((32,), torch.int64)},
            "model.norm.weight holds torch.int64",
        ),
        (
            {"model.layers.0.self_attn.q_proj.weight": TensorInfo((32, 32), torch.float16)},
            "different kinds",
        ),
        ({"lm_head.weight": None}, "1 missing: lm_head.weight"),
    ],
)
def test_every_tensor_must_occur_once_with_its_shape(changes, message):
    with pytest.raises(CheckpointError, match=message):
        check_theirs(PAIRS, changed(**changes), "model")


def test_tensors_computed_from_the_config_may_be_stored():
    stored = changed(
        **{"model.layers.0.self_attn.rotary_emb.inv_freq": TensorInfo((4,), torch.float32)}
    )
    assert check_theirs(PAIRS, stored, "model") is False


def test_a_tied_model_may_store_its_head():
    settings = dataclasses.replace(
        settings_of_config(MODEL.config.to_dict(), "config.json"),
        untie_embeddings_and_output_weights=False,
    )
    assert check_theirs(tensor_table(settings), infos(MODEL), "model") is True


def test_own_parts_of_exits_are_in_the_table():
    settings = dataclasses.replace(
        settings_of_config(MODEL.config.to_dict(), "config.json"),
        exit_layer_nums=(1, 3),
        use_exit_norm=True,
        untie_exit_output_weights=True,
    )
    own = {pair.ours: pair.theirs for pair in tensor_table(settings) if pair.is_own_exit}
    assert own == {
        "exit_norms.1.weight": ("exits.1.norm.weight",),
        "exit_output_layers.1.weight": ("exits.1.lm_head.weight",),
        "exit_norms.3.weight": ("exits.3.norm.weight",),
        "exit_output_layers.3.weight": ("exits.3.lm_head.weight",),
    }


def test_only_padding_may_differ_on_our_side():
    ours = {pair.ours: TensorInfo(pair.shape, torch.float32) for pair in PAIRS}
    check_ours(
        PAIRS, {**ours, "output_layer.weight": TensorInfo((128, 32), torch.float32)}, "checkpoint"
    )
    with pytest.raises(CheckpointError, match=r"output_layer.weight has shape \[90, 32\]"):
        check_ours(
            PAIRS,
            {**ours, "output_layer.weight": TensorInfo((90, 32), torch.float32)},
            "checkpoint",
        )
    with pytest.raises(CheckpointError, match=r"1 unknown: decoder.layers.9.x"):
        check_ours(
            PAIRS, {**ours, "decoder.layers.9.x": TensorInfo((1,), torch.float32)}, "checkpoint"
        )
