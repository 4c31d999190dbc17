"""Imported models of every family have transformers' logits at every depth of a training run."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sorted.checkpoint.manifest import EXIT_OWNED_FIELDS, ROPE_FIELDS, SHAPE_FIELDS
from megatron_sorted.conversion.exporting import export_model
from megatron_sorted.conversion.importing import import_model
from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.conversion.origins import RequestedExits
from megatron_sorted.conversion.writing import WriteOptions
from megatron_sorted.settings.run import Settings
from tests.support.given_weights import join_logits, load_and_report
from tests.support.hugging_face import exit_logits
from tests.support.model_directories import FAMILIES, save_model, tokens
from tests.support.ranks import run_ranks
from tests.support.tiny import VOCABULARY, tiny

TP2_PP2 = (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2})
ONE = (1, {})
# family, tied, layout; test_imported_models.py has most of the other tyings
CASES = [
    ("llama", True, TP2_PP2),
    ("llama3", False, TP2_PP2),
    ("llama_linear", True, TP2_PP2),
    ("mistral", True, TP2_PP2),
    ("qwen2", False, TP2_PP2),
    ("qwen3", True, TP2_PP2),
    ("llama_linear", False, ONE),
]
LENGTH = 40


def settings_like(network: Settings, split: dict) -> Settings:
    """Return the settings of a tiny run of the network that an import found."""
    names = (*SHAPE_FIELDS, *ROPE_FIELDS, *EXIT_OWNED_FIELDS)
    fields = {name: getattr(network, name) for name in names}
    return tiny(
        **{**fields, "exit_layer_nums": (1, 2, 3), "seq_length": LENGTH, "lr": 1e-7, **split}
    )


def logits_in_ranks(directory, layout) -> dict[int, torch.Tensor]:
    """Return {depth: logits} of a run of this layout that loaded the checkpoint."""
    world_size, split = layout
    reports = run_ranks(
        world_size,
        load_and_report,
        settings_like(open_model(directory).settings, split),
        str(directory),
        tokens(LENGTH),
    )
    return join_logits(
        [(report["tensor rank"], set(), report["logits"]) for report in reports], VOCABULARY
    )


def assert_close(got: dict[int, torch.Tensor], expected: dict[int, torch.Tensor]) -> None:
    assert got.keys() == expected.keys() == {1, 2, 3, 4}
    for depth, logits in expected.items():
        largest = float(logits.abs().max())
        assert largest > 1, "logits so small would agree whatever the network"
        assert float((got[depth] - logits).abs().max()) <= 1e-5 * largest, depth


def test_every_family_and_both_tyings_are_among_the_cases():
    assert {family for family, _, layout in CASES if layout is TP2_PP2} == set(FAMILIES)
    assert {tied for _, tied, layout in CASES if layout is TP2_PP2} == {False, True}


@pytest.mark.parametrize(
    ("family", "tied", "layout"),
    CASES,
    ids=[f"{family} tied={tied} on {n}" for family, tied, (n, _) in CASES],
)
def test_an_imported_model_has_the_logits_of_transformers(family, tied, layout, tmp_path):
    model = save_model(tmp_path / "theirs", family, tied)
    import_model(
        open_model(tmp_path / "theirs"),
        tmp_path / "imported",
        RequestedExits((1, 2, 3)),
        WriteOptions(verify=False),
    )
    assert_close(logits_in_ranks(tmp_path / "imported", layout), exit_logits(model, tokens(LENGTH)))


def test_norms_and_heads_of_exits_are_loaded_too(tmp_path):
    model = save_model(tmp_path / "theirs", "qwen2", tied=True)
    import_model(
        open_model(tmp_path / "theirs"),
        tmp_path / "copies",
        RequestedExits((1, 2, 3), own_norms=True, own_heads=True),
        WriteOptions(verify=False),
    )
    export_model(open_model(tmp_path / "copies"), tmp_path / "nested", WriteOptions(verify=False))
    generator = torch.Generator().manual_seed(11)
    own = {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(tmp_path / "nested" / "exits.safetensors").items()
    }
    save_file(own, tmp_path / "nested" / "exits.safetensors", {"format": "pt"})
    assert json.loads((tmp_path / "nested" / "config.json").read_text())["own_exit_norms"] is True
    import_model(
        open_model(tmp_path / "nested"),
        tmp_path / "imported",
        RequestedExits(),
        WriteOptions(verify=False),
    )

    states, expected = {}, {}
    hooks = [
        layer.register_forward_hook(
            lambda _m, _i, output, depth=depth: states.__setitem__(
                depth, output[0] if isinstance(output, tuple) else output
            )
        )
        for depth, layer in enumerate(model.model.layers, 1)
    ]
    with torch.no_grad():
        expected[4] = model(tokens(LENGTH), use_cache=False).logits
        for depth in (1, 2, 3):
            scale = torch.rsqrt(
                states[depth].square().mean(-1, keepdim=True) + model.config.rms_norm_eps
            )
            expected[depth] = (
                states[depth]
                * scale
                * own[f"exits.{depth}.norm.weight"]
                @ own[f"exits.{depth}.lm_head.weight"].T
            )
    for hook in hooks:
        hook.remove()
    assert_close(logits_in_ranks(tmp_path / "imported", TP2_PP2), expected)
    assert dataclasses.asdict(open_model(tmp_path / "imported").settings)[
        "untie_exit_output_weights"
    ]
