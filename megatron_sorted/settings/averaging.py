"""Settings of averaged weights, their rules, and the steps whose weights are averaged."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from megatron_sorted.settings.field import AllSettings, flag_of, setting
from megatron_sorted.settings.require import require


@dataclass(frozen=True)
class AveragingSettings:
    """Averaging of the weights along the end of a run (SWA, arXiv 1803.05407, 2212.05956)."""

    average_weights_from: float | None = setting(
        None,
        "Keep an average of the weights of all steps after this fraction of --train-iters; it "
        "does not change training. By default none is kept.",
    )
    average_every: int = setting(
        1, "With --average-weights-from: number of steps from one averaged step to the next."
    )
    average_weights_decay: float | None = setting(
        None,
        "With --average-weights-from: make the average an exponential one, which keeps this share "
        "of itself at each averaged step; by default all averaged steps count alike.",
    )
    evaluate_averaged: bool = setting(
        False,
        "Evaluate the averaged weights after the last ones: with --average-weights-from, or with "
        "--skip-train those of the checkpoint.",
    )
    save_hf_weights: Literal["last", "averaged", "both"] = setting(
        "last",
        "Weights that --save-hf exports: those of the last step, the averaged ones, or both, into "
        "the folders last and averaged of that directory.",
    )


@dataclass(frozen=True)
class Averaging:
    """The steps whose weights are averaged, and how much each counts.

    Attributes:
        start: The step after which averaging starts; its own weights do not count.
        every: Number of steps from one averaged step to the next: the first is start + every.
        decay: The share of itself that an exponential average keeps at each averaged step; None
            for the mean.
    """

    start: int
    every: int
    decay: float | None = None

    def count(self, step: int) -> int:
        """Return the number of averaged steps up to ``step``, that one included.

        It follows from the step alone, so no checkpoint needs to hold it.

        >>> [Averaging(start=10, every=5).count(step) for step in (10, 14, 15, 20)]
        [0, 0, 1, 2]
        """
        return max(0, step - self.start) // self.every

    def includes(self, step: int) -> bool:
        """Return whether the weights after ``step`` are averaged."""
        return step > self.start and (step - self.start) % self.every == 0

    def share(self, step: int) -> float:
        """Return the share in the average that the weights after ``step`` get when they join it.

        The first averaged step has all of it. Source: for the mean, w_mean <- (n w_mean + w) /
        (n + 1) (arXiv 1803.05407).

        >>> [Averaging(start=10, every=5).share(step) for step in (15, 20, 25, 30)]
        [1.0, 0.5, 0.3333333333333333, 0.25]
        """
        count = self.count(step)
        return 1.0 / count if self.decay is None or count == 1 else 1.0 - self.decay


def averaging_of(settings: AllSettings) -> Averaging | None:
    """Return the steps that a run averages; None if it keeps no average."""
    if settings.average_weights_from is None:
        return None
    start = round(settings.average_weights_from * settings.train_iters)
    return Averaging(start, settings.average_every, settings.average_weights_decay)


def saved_averaging(settings: Mapping[str, Any]) -> Averaging | None:
    """Return ``averaging_of`` a checkpoint's settings; older versions did not have all of them."""
    fraction = settings.get("average_weights_from")
    if fraction is None:
        return None
    return Averaging(
        round(fraction * settings["train_iters"]),
        settings["average_every"],
        settings["average_weights_decay"],
    )


def holds_averages(manifest: Mapping[str, Any]) -> bool:
    """Return whether the checkpoint of this manifest holds averaged weights."""
    averaging = saved_averaging(manifest.get("settings", {}))
    return averaging is not None and averaging.count(manifest["progress"]["step"]) > 0


def check_averaging(settings: AllSettings) -> None:
    """Check that an average would be kept, of this network, and that what it is for is there.

    Raises:
        SettingsError: A rule is broken.
    """
    fraction, every = settings.average_weights_from, settings.average_every
    if fraction is None:
        _check_nothing_needs_it(settings)
        return
    require(
        fraction < 1,
        f"--average-weights-from: {fraction} is not below 1, so averaging would never start. It is "
        "a fraction of --train-iters; give 0 or more, below 1.",
    )
    decay = settings.average_weights_decay
    require(
        decay is None or decay < 1,
        f"--average-weights-decay: {decay} is not below 1, so the average would stay at its first "
        "weights. Give a number above 0 and below 1, or leave it out for the mean.",
    )
    require(
        not settings.lora_rank,
        f"--average-weights-from: {fraction} with --lora-rank {settings.lora_rank}: the mean of "
        "the factors of a product is not the mean of the products that are merged into the "
        "weights, and that mean has a higher rank than the adapters. Leave one of them out.",
    )
    iters = settings.train_iters
    averaging = averaging_of(settings)
    require(
        settings.skip_train or iters == 0 or averaging.count(iters) > 0,
        f"--average-every: {every} is more than the {iters - averaging.start} steps that are left "
        f"of --train-iters {iters} after --average-weights-from {fraction}, so no weights would "
        "be averaged. Lower one of them.",
    )
    _check_export(settings)


def _check_nothing_needs_it(settings: AllSettings) -> None:
    """Check that nothing is given that has an effect with an average only."""
    for field in fields(AveragingSettings):
        value = getattr(settings, field.name)
        evaluates_checkpoint = field.name == "evaluate_averaged" and settings.skip_train
        require(
            value == field.default or evaluates_checkpoint,
            f"{flag_of(field.name)}: {value} without --average-weights-from, so there are no "
            "averaged weights. Give that as well, or leave it out.",
        )


def _check_export(settings: AllSettings) -> None:
    require(
        settings.save_hf_weights == "last" or settings.save_hf is not None,
        f"--save-hf-weights: {settings.save_hf_weights} without --save-hf, the directory to write. "
        "Give that as well, or leave it out.",
    )


def averaging_hints(settings: AllSettings) -> tuple[str, ...]:
    """Return lines for the log: which steps are averaged, and whether the schedule suits that."""
    averaging = averaging_of(settings)
    if averaging is None or settings.skip_train:
        return ()
    count = averaging.count(settings.train_iters)
    first, last = averaging.start + averaging.every, averaging.start + averaging.every * count
    kind = "the mean" if averaging.decay is None else f"an average of decay {averaging.decay}"
    lines = [
        f"keeping {kind} of the weights of {count} step{'s' * (count > 1)}: {first} to {last}, "
        f"every {averaging.every}"
    ]
    if settings.lr_decay_style != "constant" and settings.lr > settings.min_lr:
        lines.append(
            f"--lr-decay-style {settings.lr_decay_style} lowers the learning rate while weights "
            "are averaged; averaging is meant for a constant one (--lr-decay-style constant with "
            "--lr-warmup-iters), see docs/averaging.md"
        )
    if averaging.start < settings.lr_warmup_iters:
        lines.append(
            f"--average-weights-from {settings.average_weights_from} starts at step "
            f"{averaging.start}, within --lr-warmup-iters {settings.lr_warmup_iters}: weights of "
            "the warm-up are averaged too"
        )
    return tuple(lines)
