"""The checkpoint that a run continues from: the newest complete one of the same run.

Checkpoints that were passed over are listed with the reason.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sorted.checkpoint.layout import (
    TRACKER,
    checkpoint_directory,
    iteration_directory,
    saved_steps,
)
from megatron_sorted.checkpoint.manifest import WEIGHTS_ONLY, check_name, check_sizes, read_manifest
from megatron_sorted.errors import CheckpointError

NEWEST = 1 << 62  # sorts a sentence on no single checkpoint before all others
TRACKER_BYTES = 4096  # a tracker holds a number; a longer file is none
STEP = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True)
class Candidate:
    """A checkpoint whose manifest is sound and whose files have the right sizes."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Return the checkpoint's step."""
        return self.manifest["progress"]["step"]

    @property
    def saved_at(self) -> str:
        """Return the time at which it was saved, as text that sorts by time."""
        return self.manifest["saved_at"]

    @property
    def weights_only(self) -> bool:
        """Return whether it holds weights alone, as an import does; a run then starts at step 0."""
        return self.manifest.get("contents") == WEIGHTS_ONLY


@dataclass
class Candidates:
    """Checkpoints to continue from.

    Attributes:
        usable: Checkpoints to try, best first.
        skipped: (step, sentence with the reason) for each that was passed over.
    """

    usable: list[Candidate] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)

    def passed_over(self, taken: Candidate | None) -> list[str]:
        """Return the reasons for passing over checkpoints newer than ``taken``, newest first.

        If none is taken, all reasons are returned.
        """
        above = -1 if taken is None else taken.step
        return [sentence for step, sentence in sorted(self.skipped, reverse=True) if step > above]


def tracked_step(root: str | Path) -> int | None:
    """Return the step that the tracker names, or None if there is no tracker.

    Raises:
        CheckpointError: The tracker is unreadable.
    """
    tracker = Path(root) / TRACKER
    try:
        with open(tracker, "rb") as file:
            text = file.read(TRACKER_BYTES).decode("utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{tracker}: not readable ({error})") from error
    if not STEP.fullmatch(text):
        raise CheckpointError(f"{tracker}: {text[:40]!r} is not an iteration number")
    return int(text)


def _open(root: str | Path, step: int) -> Candidate:
    directory = checkpoint_directory(root, step)
    manifest = read_manifest(directory)
    check_name(directory, manifest)
    if not {"run_id", "saved_at"} <= manifest.keys():
        raise CheckpointError(
            f"{directory}: its manifest names no run or no time, "
            "so no version of megatron_sorted wrote it."
        )
    check_sizes(directory, manifest)
    return Candidate(directory, manifest)


def steps_of_run(root: str | Path, run_id: str) -> list[int]:
    """Return the steps of the complete checkpoints that a run has saved in ``root``, newest first.

    Checkpoints that are damaged, copied under another name, imported, or another run's are not
    among them.
    """
    steps = []
    for step in saved_steps(root):
        try:
            candidate = _open(root, step)
        except CheckpointError:
            continue
        if not candidate.weights_only and candidate.manifest["run_id"] == run_id:
            steps.append(step)
    return steps


def find_candidates(root: str | Path, step: int | None = None) -> Candidates:
    """Find the checkpoints that a run can continue from, newest first.

    Only manifests and file sizes are read. The tracker is written last, so a run killed right
    before has one complete checkpoint newer than the tracker's. Such newer ones count if the same
    run saved them later; those of a run that was started again, or that went back with --ckpt-step,
    do not. Weights alone (an import) are taken if nothing was saved after them.

    Args:
        root: The directory of all checkpoints.
        step: Step of the only checkpoint to consider; None for all.

    Raises:
        CheckpointError: The checkpoint of ``step`` is missing or unusable.
    """
    candidates = Candidates()
    if step is not None:
        if not checkpoint_directory(root, step).is_dir():
            present = ", ".join(map(str, saved_steps(root))) or "none"
            raise CheckpointError(
                f"--ckpt-step: {root} holds no checkpoint of step {step}; "
                f"there are: {present}. Give one of these."
            )
        candidates.usable.append(_open(root, step))
        return candidates
    try:
        tracked = tracked_step(root)
    except CheckpointError as error:
        tracked = None
        candidates.skipped.append((NEWEST, f"{error}; taking the newest complete checkpoint."))
    for number in saved_steps(root):
        try:
            candidates.usable.append(_open(root, number))
        except CheckpointError as error:
            candidates.skipped.append((number, str(error)))
    if tracked is not None and not checkpoint_directory(root, tracked).is_dir():
        missing = iteration_directory(root, tracked)
        candidates.skipped.append((tracked, f"{missing}: missing, although {TRACKER} names it."))
    if candidates.usable:
        _keep_those_of_one_run(candidates, tracked)
    return candidates


def _keep_those_of_one_run(candidates: Candidates, tracked: int | None) -> None:
    """Pass over checkpoints that are neither earlier nor later steps of the run to continue.

    The run to continue is that of the tracker's checkpoint, or of the next older one, or without a
    tracker the one that saved last. A checkpoint of weights only belongs to no run: anything saved
    after it in its directory takes precedence.
    """
    base = _base_of(candidates.usable, tracked)
    keep = []
    for one in candidates.usable:
        if reason := _reason_against(one, base):
            candidates.skipped.append((one.step, f"{one.directory}: {reason}"))
        else:
            keep.append(one)
    candidates.usable = keep


def _base_of(usable: list[Candidate], tracked: int | None) -> Candidate:
    """Return the checkpoint whose run is continued."""
    below = [one for one in usable if tracked is not None and one.step <= tracked]
    base = below[0] if below else max(usable, key=lambda one: one.saved_at)
    if base.weights_only:
        # a run that started from it may have been killed before its first checkpoint was named
        later = (one for one in usable if one.saved_at > base.saved_at)
        base = max(later, key=lambda one: one.saved_at, default=base)
    return base


def _reason_against(one: Candidate, base: Candidate) -> str | None:
    """Return why a run that continues ``base`` cannot continue from ``one``; None if it can."""
    if one is base:
        return None
    if one.weights_only:
        return "weights only, from which a run can start but not continue."
    if base.weights_only:
        event = "which was imported since"
    elif one.manifest["run_id"] != base.manifest["run_id"]:
        return f"of run {one.manifest['run_id']}, not of {base.manifest['run_id']}."
    else:
        event = "to which the run went back"
    if one.step > base.step and one.saved_at < base.saved_at:
        return f"saved before {base.directory.name}, {event}."
    return None
