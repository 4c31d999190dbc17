"""Half precision against the fp32 reference; gradients do not depend on fp16's loss scale."""

import pytest
import torch

from megatron_sorted.settings.derived import exit_depths
from tests.ranks.test_layouts import reference_run, relative
from tests.support.gather import join_ranks
from tests.support.layouts import thinned
from tests.support.rank_bodies import train_and_report
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny

LAYOUTS = [
    (1, {}),
    (2, {"pipeline_model_parallel_size": 2, "untie_embeddings_and_output_weights": True}),
    (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    (4, {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True}),
    (
        2,
        {
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
    ),
    (
        4,
        {
            "pipeline_model_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
            "untie_embeddings_and_output_weights": True,
        },
    ),
]
# bf16 keeps 8 bits: one rounding is 0.4 %, and a gradient passes tens of them
BF16_LOSS, BF16_GRADIENT = 5e-3, 5e-2
# fp16 keeps 11 bits
FP16_LOSS, FP16_GRADIENT = 1e-3, 1e-2


def check_against_reference(world_size, settings, loss_tolerance, gradient_tolerance):
    """Compare the first step's losses and gradients."""
    # unequal samples include one without a trained token, so a micro-batch of it alone has no mean
    unequal = settings.calculate_per_token_loss
    reports = run_ranks(world_size, train_and_report, settings, 1, unequal, True)
    initial, _ = join_ranks([r["initial"] for r in reports])
    losses, gradients, _ = reference_run(
        settings, initial, 1, unequal, True, reports[0]["coefficients"]
    )
    computed, _ = join_ranks([r["gradients"] for r in reports])
    assert (
        reports[0]["losses"][0].keys() == losses[0].keys() <= set(exit_depths(settings))
        and losses[0]
    )
    for depth, loss in losses[0].items():
        assert reports[0]["losses"][0][depth] == pytest.approx(loss, rel=loss_tolerance)
    assert computed.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert relative(computed[name], gradient) < gradient_tolerance, (
            f"{name}: {relative(computed[name], gradient)}"
        )
    return reports


@pytest.mark.parametrize(("world_size", "changes"), LAYOUTS)
def test_bf16(world_size, changes):
    check_against_reference(world_size, tiny(bf16=True, **changes), BF16_LOSS, BF16_GRADIENT)


@pytest.mark.parametrize(("world_size", "changes"), LAYOUTS)
@pytest.mark.parametrize("scale", thinned([1.0, 1024.0], 1024.0))
def test_fp16_gradients_do_not_depend_on_the_loss_scale(world_size, changes, scale):
    check_against_reference(
        world_size, tiny(fp16=True, loss_scale=scale, **changes), FP16_LOSS, FP16_GRADIENT
    )


def test_fp16_skips_a_step_that_overflows_and_lowers_the_scale():
    settings = tiny(
        fp16=True, initial_loss_scale=2.0**40, hysteresis=1, pipeline_model_parallel_size=2
    )
    reports = run_ranks(2, train_and_report, settings, 1, False, False)
    before, _ = join_ranks([r["initial"] for r in reports])
    after, _ = join_ranks([r["weights"] for r in reports])
    assert all(torch.equal(before[name], after[name]) for name in before), (
        "a step with infinite gradients must change nothing"
    )
    assert reports[0]["loss_scale"] == 2.0**39


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_overlap_changes_no_bit(precision):
    """Weights after three steps are the same with and without overlapped communication."""
    layout = {
        precision: True,
        "loss_scale": 64.0 if precision == "fp16" else None,
        "use_distributed_optimizer": True,
        "untie_embeddings_and_output_weights": True,
    }
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    plain, overlapped = (
        join_ranks(
            [
                r["weights"]
                for r in run_ranks(2, train_and_report, tiny(**layout, **more), 3, True, True)
            ]
        )[0]
        for more in ({}, overlap)
    )
    assert all(torch.equal(plain[name], overlapped[name]) for name in plain)


def test_selective_recompute_changes_no_bit():
    plain = run_ranks(2, train_and_report, tiny(pipeline_model_parallel_size=2), 2, False, False)
    again = run_ranks(
        2,
        train_and_report,
        tiny(pipeline_model_parallel_size=2, recompute_granularity="selective"),
        2,
        False,
        False,
    )
    expected, computed = (
        join_ranks([r["weights"] for r in plain])[0],
        join_ranks([r["weights"] for r in again])[0],
    )
    assert all(torch.equal(computed[name], expected[name]) for name in expected)
