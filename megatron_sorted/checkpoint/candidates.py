"""Which checkpoint a run continues from: the newest complete one of the same run, and what was passed over and why."""

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

NEWEST = 1 << 62  # sorts what concerns no single checkpoint before all others
TRACKER_BYTES = 4096  # a tracker holds a number; what is longer is none
STEP = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True)
class Candidate:
    """A checkpoint whose manifest is sound and whose files have the right sizes."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Return the step it was taken at."""
        return self.manifest["progress"]["step"]

    @property
    def saved_at(self) -> str:
        """Return when it was saved, as text that sorts by time."""
        return self.manifest["saved_at"]

    @property
    def weights_only(self) -> bool:
        """Return whether it holds a model alone, as an import writes it: a run starts from it at step 0."""
        return self.manifest.get("contents") == WEIGHTS_ONLY


@dataclass
class Candidates:
    """Checkpoints to try, best first, and (step, sentence) for each that was passed over."""

    usable: list[Candidate] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)

    def passed_over(self, taken: Candidate | None) -> list[str]:
        """Return the sentences of checkpoints newer than ``taken``, newest first; all of them where nothing is taken."""
        above = -1 if taken is None else taken.step
        return [sentence for step, sentence in sorted(self.skipped, reverse=True) if step > above]


def tracked_step(root: str | Path) -> int | None:
    """Return the step the tracker names, or None where there is none.

    Raises:
        CheckpointError: The tracker is unreadable.
    """
    tracker = Path(root) / TRACKER
    try:
        with open(tracker, "rb") as file:
            content = file.read(TRACKER_BYTES)
        word = content.decode("utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{tracker}: not readable ({error})") from error
    if not STEP.fullmatch(word):
        raise CheckpointError(f"{tracker}: {word[:40]!r} is not an iteration number")
    return int(word)


def _open(root: str | Path, step: int) -> Candidate:
    directory = checkpoint_directory(root, step)
    manifest = read_manifest(directory)
    check_name(directory, manifest)
    if not {"run_id", "saved_at"} <= manifest.keys():
        raise CheckpointError(
            f"{directory}: its manifest names no run or no time, so no version of ours wrote it."
        )
    check_sizes(directory, manifest)
    return Candidate(directory, manifest)


def steps_of_run(root: str | Path, run_id: str) -> list[int]:
    """Return the steps of the complete checkpoints that a run has saved in ``root``, newest first.

    What is damaged, copied under another name, imported, or another run's is not among them.
    """
    found = []
    for step in saved_steps(root):
        try:
            candidate = _open(root, step)
        except CheckpointError:
            continue
        if not candidate.weights_only and candidate.manifest["run_id"] == run_id:
            found.append(step)
    return found


def find_candidates(root: str | Path, step: int | None = None) -> Candidates:
    """Return the checkpoints a run can continue from, newest first; nothing is read but manifests and sizes.

    The tracker is written last, so a run killed right before has one complete checkpoint more than the tracker says. Newer ones count if
    they were saved later by the same run; those of a run that was started over, or that went back with --ckpt-step, do not. Weights alone
    (an import) are taken where nothing was saved after them.

    Args:
        root: The directory of all checkpoints.
        step: Only the checkpoint of this step.

    Raises:
        CheckpointError: The checkpoint of ``step`` is missing or unusable.
    """
    found = Candidates()
    if step is not None:
        if not checkpoint_directory(root, step).is_dir():
            there = ", ".join(map(str, saved_steps(root))) or "none"
            raise CheckpointError(
                f"--ckpt-step: {root} holds no checkpoint of step {step}; there are: {there}. Give one of these."
            )
        found.usable.append(_open(root, step))
        return found
    try:
        tracked = tracked_step(root)
    except CheckpointError as error:
        tracked = None
        found.skipped.append((NEWEST, f"{error}; taking the newest complete checkpoint."))
    for number in saved_steps(root):
        try:
            found.usable.append(_open(root, number))
        except CheckpointError as error:
            found.skipped.append((number, str(error)))
    if tracked is not None and not checkpoint_directory(root, tracked).is_dir():
        found.skipped.append(
            (
                tracked,
                f"{iteration_directory(root, tracked)}: missing, although {TRACKER} names it.",
            )
        )
    if found.usable:
        _keep_those_of_one_run(found, tracked)
    return found


def _keep_those_of_one_run(found: Candidates, tracked: int | None) -> None:
    """Pass over checkpoints that do not lead to the tracker's, or from it, in time.

    The run to continue is that of the tracker's checkpoint, or of the next older one, or without a tracker the one that saved last. A
    checkpoint of weights only is no run's: whatever was saved after it in its directory goes before it.
    """
    below = [one for one in found.usable if tracked is not None and one.step <= tracked]
    base = below[0] if below else max(found.usable, key=lambda one: one.saved_at)
    if (
        base.weights_only
    ):  # a run that started from it may have been killed before its first checkpoint was named
        base = max(
            (one for one in found.usable if one.saved_at > base.saved_at),
            key=lambda one: one.saved_at,
            default=base,
        )
    keep = []
    for one in found.usable:
        if one is base:
            keep.append(one)
        elif one.weights_only:
            found.skipped.append(
                (
                    one.step,
                    f"{one.directory}: weights only, with which a run can start but not go on.",
                )
            )
        elif not base.weights_only and one.manifest["run_id"] != base.manifest["run_id"]:
            found.skipped.append(
                (
                    one.step,
                    f"{one.directory}: of run {one.manifest['run_id']}, not of {base.manifest['run_id']}.",
                )
            )
        elif one.step > base.step and one.saved_at < base.saved_at:
            what = "which was imported since" if base.weights_only else "to which the run went back"
            found.skipped.append(
                (one.step, f"{one.directory}: saved before {base.directory.name}, {what}.")
            )
        else:
            keep.append(one)
    found.usable = keep
