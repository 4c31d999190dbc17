"""Legacy checkpoints: old names, EE-LLM's exits, and every kind of faulty file."""

import enum
import os
import random
import sys
import types

import pytest
import torch

from megatron_sorted.conversion.megatron.legacy_files import LegacyFiles
from megatron_sorted.errors import CheckpointError
from tests.support.stored_files import HIDDEN, LAYERS, ROWS, tiny_weights, write_old


def same(files: LegacyFiles, weights: dict) -> bool:
    assert files.tensors.keys() == weights.keys()
    return all(torch.equal(files.read(name), weights[name]) for name in weights)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 4)])
def test_old_names_give_the_same_weights(tp, pp, untied, tmp_path):
    weights = tiny_weights(untied)
    write_old(tmp_path, weights, tp, pp)
    files = LegacyFiles(tmp_path)
    assert same(files, weights) and files.step == 7


def test_names_before_2023_and_module_prefixes_are_translated(tmp_path):
    def older(state, stage, rank):
        model = state["model"]["language_model"]
        encoder = {
            name.replace("_norm.", "_layernorm."): value for name, value in model["encoder"].items()
        }
        encoder["layers.0.self_attention.core_attention._extra_state"] = None
        encoder["layers.1.self_attention.linear_qkv._extra_state"] = torch.zeros(
            3, dtype=torch.uint8
        )
        state["model"] = {"module": {"language_model": {**model, "encoder": encoder}}}

    weights = tiny_weights(True)
    write_old(tmp_path, weights, 1, 1, older)
    assert same(LegacyFiles(tmp_path), weights)


@pytest.mark.parametrize(("pre_exit", "depths"), [(False, (1, 3)), (True, (0, 2))])
def test_exits_of_ee_llm_get_their_depth(pre_exit, depths, tmp_path):
    weights, own = tiny_weights(), {}

    def with_exits(state, stage, rank):
        number = (1, 3)[stage]  # one exit on each stage of two layers: its first layer
        norm, head = (
            torch.full((HIDDEN,), float(number)),
            torch.arange(ROWS * HIDDEN).reshape(ROWS, HIDDEN) * float(number),
        )
        own.update(
            {
                f"exit_norms.{depths[stage]}.weight": norm,
                f"exit_output_layers.{depths[stage]}.weight": head,
            }
        )
        state["model"]["language_model"]["encoder"]["layers.0.exit_norm.weight"] = norm
        state["model"]["language_model"]["exit_output_layer"] = {
            "0.weight": head.chunk(2)[rank].clone()
        }

    write_old(tmp_path, weights, 2, 2, with_exits, exit_layer_nums=[1, 3], pre_exit=pre_exit)
    assert same(LegacyFiles(tmp_path), {**weights, **own})


def saved_with_another_class(state, stage, rank):
    state["args"].hook = os.getcwd


def other_embedding(state, stage, rank):
    if stage == 1:
        state["model"]["word_embeddings_for_head"]["weight"][3, 1] += 1


def other_norm(state, stage, rank):
    if rank == 1 and stage == 0:
        state["model"]["language_model"]["encoder"]["layers.1.input_norm.weight"][2] += 0.5


def without_a_layer(state, stage, rank):
    encoder = state["model"]["language_model"]["encoder"]
    if stage == 1:
        for name in [name for name in encoder if name.startswith("layers.1.")]:
            del encoder[name]


def without_a_part(state, stage, rank):
    if rank == 1:
        del state["model"]["language_model"]["encoder"]["layers.0.mlp.dense_4h_to_h.weight"]


def another_width(state, stage, rank):
    if rank == 1:
        state["model"]["language_model"]["encoder"]["layers.0.mlp.dense_4h_to_h.weight"] = (
            torch.zeros(HIDDEN, 5).bfloat16()
        )


def with_a_pooler(state, stage, rank):
    state["model"]["language_model"]["pooler"] = {"dense": {"weight": torch.zeros(2, 2)}}


FAULTS = {
    "another class": (
        saved_with_another_class,
        r"refused: it asks for \S+getcwd.*save it again without",
    ),
    "head is not the embedding": (other_embedding, "output_layer.weight of the last stage differs"),
    "a layer less": (without_a_layer, "holds 3 layers, but was saved with num_layers 4"),
    "a part less": (
        without_a_part,
        r"mp_rank_01_000 lacks decoder\.layers\.0\.mlp\.linear_fc2\.weight",
    ),
    "a part of another shape": (
        another_width,
        r"linear_fc2\.weight is torch.bfloat16 \[8, 6\] on tensor parallel rank 0, but",
    ),
    "not a GPT model": (
        with_a_pooler,
        r"language_model\.pooler\.dense\.weight: no weight of a plain GPT model",
    ),
    "another iteration": (
        lambda state, stage, rank: state.update(iteration=7 + stage),
        "is of iteration 8, the first of 7",
    ),
    "older order of queries": (
        lambda state, stage, rank: state.update(checkpoint_version=1.0),
        "checkpoint version 1.0",
    ),
    "experts": (lambda state, stage, rank: setattr(state["args"], "num_experts", 4), "experts"),
    "another layout in the arguments": (
        lambda state, stage, rank: setattr(state["args"], "tensor_model_parallel_size", 4),
        "saved with tensor_model_parallel_size 4, but files of 2",
    ),
    "no model": (lambda state, stage, rank: state.pop("model"), "holds no model"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_inconsistent_files_are_refused(fault, tmp_path):
    change, message = FAULTS[fault]
    write_old(tmp_path, tiny_weights(), 2, 2, change)
    with pytest.raises(CheckpointError, match=message):
        LegacyFiles(tmp_path)


def test_copies_that_differ_are_refused_when_read(tmp_path):
    write_old(tmp_path, tiny_weights(), 2, 2, other_norm)
    files = LegacyFiles(tmp_path)
    name = "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    with pytest.raises(CheckpointError, match=rf"{name} differs .*mp_rank_01_000: by up to 0\.5"):
        files.read(name)


def test_missing_and_damaged_files_are_refused(tmp_path):
    write_old(tmp_path, tiny_weights(), 2, 2)
    lost = tmp_path / "mp_rank_01_001" / "model_optim_rng.pt"
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(CheckpointError, match=r"mp_rank_01_001/model_optim_rng\.pt: is missing"):
        LegacyFiles(tmp_path)
    lost.parent.rmdir()
    with pytest.raises(CheckpointError, match="mp_rank_01_001: is missing; there are 3 of 4"):
        LegacyFiles(tmp_path)
    lost.parent.mkdir()
    lost.write_bytes(content[:-500])
    with pytest.raises(CheckpointError, match=r"mp_rank_01_001.*damaged or was cut off"):
        LegacyFiles(tmp_path)


def test_a_flipped_bit_of_a_weight_is_detected(tmp_path):
    weights = tiny_weights(True)
    write_old(tmp_path, weights)
    path, name = (
        tmp_path / "mp_rank_00" / "model_optim_rng.pt",
        "decoder.layers.2.mlp.linear_fc1.weight",
    )
    content, wanted = (
        bytearray(path.read_bytes()),
        weights[name].view(torch.int16).numpy().tobytes(),
    )
    content[content.index(wanted) + 100] ^= 4
    path.write_bytes(content)
    files = LegacyFiles(tmp_path)
    with pytest.raises(CheckpointError, match="do not match their checksum"):
        files.read(name)


def test_enumerations_of_megatron_are_read_without_megatron(tmp_path):
    """Arguments hold enumerations, and files random state, of packages that may not be there."""
    import numpy

    modules = {
        "megatron.model.enums": "AttnMaskType",
        "megatron.core.transformer.enums": "AttnBackend",
    }
    before = {name: sys.modules.get(name) for name in modules}
    try:
        kinds = []
        for module, name in modules.items():
            kind = enum.Enum(name, {"flash": 1}, module=module)
            sys.modules[module] = types.SimpleNamespace(**{name: kind})
            kinds.append(kind.flash)

        def more(state, stage, rank):
            state["args"].kinds = kinds
            state["rng_state"] = [
                {"random_rng_state": random.getstate(), "np_rng_state": numpy.random.get_state()}
            ]

        weights = tiny_weights()
        write_old(tmp_path, weights, 1, 1, more)
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})
    files = LegacyFiles(tmp_path)
    assert (
        same(files, weights)
        and repr(files.arguments["kinds"]) == "[AttnMaskType(1,), AttnBackend(1,)]"
    )


def test_views_of_shared_storage_are_read_unchanged(tmp_path):
    weights = tiny_weights()

    def shared(state, stage, rank):
        encoder = state["model"]["language_model"]["encoder"]
        both = torch.stack(
            [encoder[f"layers.{n}.self_attention.dense.weight"].t() for n in range(LAYERS)]
        )
        for n in range(LAYERS):
            encoder[f"layers.{n}.self_attention.dense.weight"] = both[n].t()

    write_old(tmp_path, weights, 1, 1, shared)
    files = LegacyFiles(tmp_path)
    assert same(files, weights)
    read = files.read("decoder.layers.1.self_attention.linear_proj.weight")
    assert read.is_contiguous() and read.untyped_storage().nbytes() == 2 * HIDDEN * HIDDEN
