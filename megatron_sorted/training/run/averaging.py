"""Averaged weights in a run: whether it keeps them, and the checkpoints that it can resume from."""

from megatron_sorted.checkpoint.candidates import Candidate
from megatron_sorted.errors import CheckpointError
from megatron_sorted.settings.averaging import (
    Averaging,
    averaging_of,
    holds_averages,
    saved_averaging,
)
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step.build import Model
from megatron_sorted.training.step.weight_average import WeightAverage


def make_average(settings: Settings, model: Model) -> WeightAverage | None:
    """Return the average that the run adds to, or evaluates a checkpoint's of; None without one."""
    if settings.skip_train:
        return WeightAverage(model, None) if settings.evaluate_averaged else None
    averaging = averaging_of(settings)
    return None if averaging is None else WeightAverage(model, averaging)


def check_has_averages(candidate: Candidate, settings: Settings) -> None:
    """Check that the checkpoint holds averaged weights, if the run is to evaluate them.

    Raises:
        CheckpointError: It holds none.
    """
    if (
        settings.skip_train
        and settings.evaluate_averaged
        and not holds_averages(candidate.manifest)
    ):
        raise CheckpointError(
            f"--evaluate-averaged: {candidate.directory} holds no averaged weights. Load a "
            "checkpoint that a run with --average-weights-from saved after its first averaged step "
            "(--ckpt-step), or leave the flag out."
        )


def check_same_averaging(candidate: Candidate, settings: Settings) -> None:
    """Check that the run continues the average of the checkpoint, if one of them has begun.

    Where neither has averaged a step yet, the flags may change freely.

    Raises:
        CheckpointError: Averaged steps would be lost, missing, or of two kinds.
    """
    step = candidate.manifest["progress"]["step"]
    before, now = saved_averaging(candidate.manifest.get("settings", {})), averaging_of(settings)
    counts = [0 if one is None else one.count(step) for one in (before, now)]
    if before == now or not any(counts):
        return
    if not counts[0]:
        raise CheckpointError(
            f"--average-weights-from: {settings.average_weights_from} of --train-iters "
            f"{settings.train_iters} begins after step {now.start}, but {candidate.directory} is "
            f"of step {step} and has averaged nothing. Give a fraction of at least "
            f"{fraction_of(step, settings.train_iters)}, or leave it out."
        )
    saved = candidate.manifest["settings"]
    raise CheckpointError(
        f"--average-weights-from: {candidate.directory} holds {_described(before, counts[0])}, "
        f"which this run would not continue ({_described(now, counts[1])}). Give "
        f"--average-weights-from {fraction_of(before.start, settings.train_iters)} --average-every "
        f"{before.every}"
        + ("" if before.decay is None else f" --average-weights-decay {before.decay}")
        + f" with --train-iters {settings.train_iters} (the checkpoint had "
        f"{saved['average_weights_from']} of {saved['train_iters']}), or start at step 0 with "
        "--finetune."
    )


def fraction_of(step: int, iters: int) -> str:
    """Return a short fraction of ``iters`` steps that is ``step`` once it is rounded.

    >>> fraction_of(50, 150)
    '0.33'
    """
    for digits in range(1, 18):
        fraction = round(step / max(iters, 1), digits)
        if round(fraction * iters) == step:
            return f"{fraction:g}" if digits < 6 else repr(fraction)
    return repr(step / max(iters, 1))


def _described(averaging: Averaging | None, count: int) -> str:
    if averaging is None:
        return "no average"
    kind = "mean" if averaging.decay is None else f"average of decay {averaging.decay}"
    return (
        f"the {kind} of {count} step{'s' * (count != 1)}, every {averaging.every} after step "
        f"{averaging.start}"
    )
