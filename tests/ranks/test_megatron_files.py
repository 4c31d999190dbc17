"""Weights read from GPTModel's checkpoints, in any form and layout, equal those of one process."""

import dataclasses
import inspect

import pytest
import torch

from megatron_sorted.checkpoint.plain_objects import check_checkpoint_is_safe
from megatron_sorted.checkpoint.restricted_pickle import read_stored_names
from megatron_sorted.conversion.megatron.common_state import COMMON_FILE, COMMON_OBJECT
from megatron_sorted.conversion.megatron.directory import open_megatron
from megatron_sorted.conversion.megatron.legacy_files import LegacyFiles
from megatron_sorted.conversion.megatron.torch_dist_files import TorchDistFiles
from tests.support.layouts import CHUNKS, PP2, TP2, UNTIED
from tests.support.megatron_files import FORMS, make_truth, plain_name_of, save_as_megatron
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny

BIASED = {"disable_bias_linear": False, "swiglu": False, "ffn_hidden_size": 96}
LAYOUTS = {
    "one process": (1, {}),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "pp2 chunks": (2, {**PP2, **CHUNKS}),
    "tp2 pp2": (4, {**TP2, **PP2}),
    "tp2 pp2 chunks untied": (4, {**TP2, **PP2, **CHUNKS, **UNTIED}),
    "tp2 pp2 uneven": (4, {**TP2, **PP2, "decoder_first_pipeline_num_layers": 1}),
    "tp2 query norms and biases": (2, {**TP2, "qk_layernorm": True, "add_qkv_bias": True}),
    "tp2 all biases, no gate": (2, {**TP2, **BIASED, **UNTIED}),
}


def installed_form() -> str:
    """Return where the installed Megatron saves what all ranks share."""
    from megatron.core import dist_checkpointing

    # It lost the argument of the file's writer when it began to write an object.
    writes_file = "common_strategy" in inspect.signature(dist_checkpointing.save).parameters
    return COMMON_FILE if writes_file else COMMON_OBJECT


@pytest.fixture(scope="module")
def truths(tmp_path_factory):
    """Return a function that computes the reference for a kind of network once."""
    made: dict = {}

    def truth(changes: dict):
        network = {
            k: v
            for k, v in changes.items()
            if k not in (*TP2, *PP2, *CHUNKS, "decoder_first_pipeline_num_layers")
        }
        key = tuple(sorted(network.items()))
        if key not in made:
            seed = str(tmp_path_factory.mktemp("truth") / "seed")
            (weights,) = run_ranks(1, make_truth, tiny(**network), seed)
            made[key] = seed, {plain_name_of(name): value for name, value in weights.items()}
        return made[key]

    return truth


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_those_of_one_process(layout, truths, tmp_path):
    world_size, changes = LAYOUTS[layout]
    seed, truth = truths(changes)
    settings = tiny(
        make_vocab_size_divisible_by=8 // changes.get("tensor_model_parallel_size", 1), **changes
    )
    run_ranks(world_size, save_as_megatron, settings, seed, str(tmp_path), 300)
    for form in FORMS:
        source, given = open_megatron(tmp_path / form)
        assert isinstance(source, LegacyFiles if form == "legacy" else TorchDistFiles)
        assert source.tensors.keys() == truth.keys(), form
        for name, info in source.tensors.items():
            read = source.read(name)
            assert (tuple(read.shape), read.dtype) == (info.shape, info.dtype)
            assert torch.equal(read, truth[name]), f"{form} {name}"
            assert read.untyped_storage().nbytes() == info.num_bytes, f"{form} {name}"
        shape = {
            name: value for name, value in dataclasses.asdict(settings).items() if name in given
        }
        assert given == {
            **shape,
            "kv_channels": 8,
            "max_position_embeddings": 16,
            "vocab_size": 104,
            "make_vocab_size_divisible_by": 8,
        }
        if form != "legacy":
            check_checkpoint_is_safe(source.directory)
    places = {
        form: set(TorchDistFiles(tmp_path / form / "iter_0000300").common_states())
        for form in FORMS[1:]
    }
    assert places == {
        "stacked": {installed_form()},
        "per_layer": {COMMON_FILE},
        "norms_by_module": {COMMON_OBJECT},
    }
    names = {
        form: set(read_stored_names(tmp_path / form / "iter_0000300").tensors) for form in FORMS[1:]
    }
    assert "decoder.layers.self_attention.linear_qkv.weight" in names["stacked"]
    assert "decoder.layers.3.self_attention.linear_qkv.weight" in names["per_layer"]
    assert "decoder.layers.pre_mlp_layernorm.weight" in names["norms_by_module"]
