"""With which averaging a run may resume from a checkpoint."""

from dataclasses import replace

import pytest

from megatron_sorted.checkpoint.candidates import Candidate
from megatron_sorted.errors import CheckpointError
from megatron_sorted.settings.load import settings_as_dict
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.averaging import (
    check_has_averages,
    check_same_averaging,
    fraction_of,
)

RUN = Settings(train_iters=100, average_weights_from=0.5, average_every=10)
NONE = replace(RUN, average_weights_from=None, average_every=1)


def checkpoint(tmp_path, settings: Settings, step: int) -> Candidate:
    """Return a checkpoint of a run at a step, as far as the rules read it."""
    manifest = {"progress": {"step": step, "samples": step}, "settings": settings_as_dict(settings)}
    return Candidate(tmp_path / f"iter_{step:07d}", manifest)


@pytest.mark.parametrize(
    ("saved", "step", "now"),
    [
        (RUN, 80, RUN),
        (RUN, 59, NONE),  # nothing was averaged yet
        (NONE, 50, RUN),
        (NONE, 59, RUN),
        (RUN, 59, replace(RUN, average_every=20)),
        (RUN, 80, replace(RUN, train_iters=200, average_weights_from=0.25)),  # the same steps
    ],
)
def test_a_run_may_go_on_with_the_same_average_or_before_the_first_averaged_step(
    saved, step, now, tmp_path
):
    check_same_averaging(checkpoint(tmp_path, saved, step), now)


@pytest.mark.parametrize(
    ("saved", "step", "now", "message"),
    [
        (
            RUN,
            80,
            replace(RUN, average_weights_from=0.6),
            "holds the mean of 3 steps, every 10 after step 50, which this run would not continue "
            "(the mean of 2 steps, every 10 after step 60). Give --average-weights-from 0.5 "
            "--average-every 10 with --train-iters 100 (the checkpoint had 0.5 of 100)",
        ),
        (RUN, 80, NONE, "which this run would not continue (no average)"),
        (RUN, 80, replace(RUN, average_every=5), "(the mean of 6 steps, every 5 after step 50)"),
        (
            RUN,
            80,
            replace(RUN, average_weights_decay=0.9),
            "(the average of decay 0.9 of 3 steps, every 10 after step 50)",
        ),
        (
            RUN,
            80,
            replace(RUN, train_iters=150),
            "Give --average-weights-from 0.33 --average-every 10 with --train-iters 150",
        ),
        (
            NONE,
            60,
            RUN,
            "begins after step 50, but {root}/iter_0000060 is of step 60 and has averaged nothing. "
            "Give a fraction of at least 0.6, or leave it out.",
        ),
    ],
)
def test_averaged_steps_that_would_be_lost_or_missing_are_refused(
    saved, step, now, message, tmp_path
):
    with pytest.raises(CheckpointError) as refusal:
        check_same_averaging(checkpoint(tmp_path, saved, step), now)
    assert message.format(root=tmp_path) in str(refusal.value)


def test_only_a_checkpoint_with_averages_can_be_evaluated_for_them(tmp_path):
    evaluates = replace(NONE, skip_train=True, evaluate_averaged=True)
    check_has_averages(checkpoint(tmp_path, RUN, 60), evaluates)
    check_has_averages(checkpoint(tmp_path, NONE, 60), replace(evaluates, evaluate_averaged=False))
    for saved, step in ((RUN, 59), (NONE, 100)):
        with pytest.raises(CheckpointError, match="holds no averaged weights"):
            check_has_averages(checkpoint(tmp_path, saved, step), evaluates)


@pytest.mark.parametrize("iters", [1, 7, 100, 150, 12345])
def test_the_fraction_that_is_proposed_is_that_step_again(iters):
    for step in range(0, iters, max(1, iters // 50)):
        assert round(float(fraction_of(step, iters)) * iters) == step
