"""A run starts from weights alone, in any layout and precision, and computes the same outputs."""

import pytest
import torch

from megatron_sorted.checkpoint.manifest import Progress
from megatron_sorted.model.config import parameter_dtype
from tests.support.gather import join_ranks
from tests.support.given_weights import join_logits, load_and_report
from tests.support.layouts import OWN, UNTIED
from tests.support.rank_bodies import steps_from
from tests.support.ranks import run_ranks
from tests.support.reference import exit_logits
from tests.support.tiny import VOCABULARY, make_samples, tiny
from tests.support.weights_only import strip_to_weights, weights_by_layer

TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
DISTRIBUTED = {"use_distributed_optimizer": True, "bf16": True}
# settings of the run that saved, dtype in the file, (processes, settings) of the run that loads it
CASES = {
    "tied -> tp2 pp2": ({}, None, (4, TP2_PP2)),
    "untied bf16 file -> fp32": (UNTIED, torch.bfloat16, (1, UNTIED)),
    "bf16 run, fp32 file -> bf16 distributed": ({"bf16": True}, torch.float32, (2, DISTRIBUTED)),
    "fp32 file -> bf16 run of tp2 pp2": (
        UNTIED,
        torch.float32,
        (4, {**UNTIED, **TP2_PP2, "bf16": True}),
    ),
    "bf16 file -> bf16 run with sgd": (
        {"bf16": True},
        torch.bfloat16,
        (1, {"bf16": True, "optimizer": "sgd"}),
    ),
    "own norms and heads -> pp2": (OWN, None, (2, {**OWN, "pipeline_model_parallel_size": 2})),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_of_a_file_arrive_in_every_layout_and_dtype(name, tmp_path):
    before, dtype, (world_size, after) = CASES[name]
    (tmp_path / "run").mkdir()
    saved = run_ranks(1, steps_from, tiny(**before), str(tmp_path / "run"), False, 0, 2, True)[0][
        "outcome"
    ].directory
    stripped = strip_to_weights(saved, tmp_path / "imported", dtype)
    in_file = weights_by_layer(stripped)
    assert dtype is None or all(weight.dtype == dtype for weight in in_file.values())
    settings, tokens = tiny(**after, lr=1e-7), make_samples(2, 16, 9)["tokens"]
    reports = run_ranks(world_size, load_and_report, settings, str(tmp_path / "imported"), tokens)
    assert reports[0]["progress"] == Progress(0, 0)
    assert reports[0]["lines"] == [
        f"loaded {stripped}: weights only (it holds nothing else), starting at step 0"
    ]
    (held, copies), (later, _) = (
        join_ranks([report[key] for report in reports]) for key in ("weights", "weights after")
    )
    assert held.keys() == in_file.keys()
    for key, weight in in_file.items():
        rows = slice(VOCABULARY) if "embedding" in key or "output_layer" in key else slice(None)
        assert torch.equal(held[key][rows], weight.to(parameter_dtype(settings)).float()[rows]), key
        # an optimizer with its own copy of the initial random weights would restore these with its
        # first step
        assert (later[key][rows] - held[key][rows]).abs().max() < 1e-5, key
    assert all(torch.equal(tensor, tensors[0]) for tensors in copies.values() for tensor in tensors)
    if not settings.bf16:
        weights = {key: weight.float() for key, weight in in_file.items()}
        expected = exit_logits(weights, tokens, None, (1, 2, 3, 4), 4, 2, VOCABULARY)
        got = join_logits(
            [(report["tensor rank"], set(), report["logits"]) for report in reports], VOCABULARY
        )
        assert got.keys() == expected.keys()
        assert all((got[depth] - expected[depth]).abs().max() < 1e-5 for depth in expected)
