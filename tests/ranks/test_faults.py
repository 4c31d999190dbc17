"""Numbers that are not finite, and ranks that hang, are named and do no damage."""

import pytest

from megatron_sorted.errors import TrainingError
from megatron_sorted.training.step_result import Flags, StepResult, TrainedStep
from megatron_sorted.training.watch.nonfinite import NonfiniteSteps
from tests.support.rank_bodies import hang_somewhere, train_with_poison
from tests.support.ranks import run_ranks
from tests.support.same_state import assert_same_state
from tests.support.tiny import tiny

LAYOUTS = {
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2 distributed bf16": (2, {"use_distributed_optimizer": True, "bf16": True}),
    "tp2 sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2 chunks dp2": (
        4,
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    ),
}


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_that_is_not_finite_is_named_and_leaves_no_trace(name, what):
    world_size, changes = LAYOUTS[name]
    settings = tiny(**changes, lr_decay_style="cosine")
    rank, depth = (1, 3) if name.startswith("pp2") else (0, 2)
    poisoned = run_ranks(
        world_size, train_with_poison, settings, {1: (rank, depth, what)}, [0, 1, 2]
    )
    without = run_ranks(world_size, train_with_poison, settings, {}, [0, 2])
    for report in poisoned:
        first, bad, third = report["results"]
        assert first.stepped and third.stepped and first.not_finite is third.not_finite is None
        assert not bad.stepped and bad.not_finite.startswith(
            f"{what} of exit {depth} not finite on rank{'s' * (',' in bad.not_finite)} "
        )
        assert str(rank) in bad.not_finite.split(";")[0]
        assert bad.not_finite == poisoned[0]["results"][1].not_finite
        assert report["rate"] == without[0]["rate"]
    assert_same_state(poisoned, without)


def steps_and_lines() -> tuple[NonfiniteSteps, list[str]]:
    """Return a counter of such steps, one in a row allowed, and the lines it logs."""
    lines: list[str] = []
    return NonfiniteSteps(1, lines.append), lines


def a_step(number: int, where: str | None) -> TrainedStep:
    """Return a step that was not finite at ``where``; None for a good one."""
    return TrainedStep(
        number,
        8 * number,
        StepResult(where is None, 1.0, where),
        reports=False,
        is_last=False,
        flags=Flags(),
    )


def test_one_step_too_many_ends_the_run():
    steps, lines = steps_and_lines()
    steps.after(a_step(4, "loss of exit 2 not finite on rank 0"))
    assert lines == ["step 4 skipped: loss of exit 2 not finite on rank 0 (1 in a row, 1 allowed)"]
    with pytest.raises(TrainingError) as error:
        steps.after(a_step(5, "loss of exit 2 not finite on rank 0"))
    assert str(error.value).startswith(
        "step 5: loss of exit 2 not finite on rank 0. That is 2 steps in a row, and "
        "--nonfinite-steps-allowed is 1. "
    )


def test_good_steps_in_between_reset_the_count():
    steps, lines = steps_and_lines()
    for number in range(1, 20, 2):
        steps.after(a_step(number, "x"))
        steps.after(a_step(number + 1, None))
    assert (steps.in_a_row, len(lines)) == (0, 10)


@pytest.mark.parametrize("rank", [0, 2])
def test_all_ranks_name_the_rank_that_hangs(rank):
    results = run_ranks(3, hang_somewhere, tiny(global_batch_size=6), rank)
    for other, result in enumerate(results):
        assert (
            f"rank {rank} (" in result["error"]
            and "does not come out of step 7, data, at rank_bodies.py:" in result["error"]
        ), result
        assert (
            "in hang_somewhere. Remove the cause, or raise --hang-timeout-minutes"
            in result["error"]
        )
        assert result["silent"] == (
            other != (1 if rank == 0 else 0)
        )  # one of those that wait reports for all
