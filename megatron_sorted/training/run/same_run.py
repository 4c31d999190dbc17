"""The same command started again: which checkpoints in --save are of this run, and go on from there."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_sorted.checkpoint.candidates import Candidate, Candidates, find_candidates
from megatron_sorted.checkpoint.layout import saved_steps
from megatron_sorted.data.tokenizer import Tokenizer
from megatron_sorted.errors import CheckpointError
from megatron_sorted.files import same_path
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.resume import check_can_continue, takes_weights_only

START = "start"  # the manifest's entry; checkpoints of 0.6.0 and before have none
ELSEWHERE = "Give another directory, or go on with the run that is there by --load {0} --save {0}."


def start_of(settings: Settings, source: Candidate | None) -> str:
    """Return what a run starts from at step 0, which is the same each time its command is given.

    Args:
        settings: The run.
        source: What it takes its weights from; None for weights drawn anew.
    """
    if source is None:
        return f"weights drawn with seed {settings.seed}"
    manifest = source.manifest
    if manifest["run_id"]:
        return f"weights of run {manifest['run_id']}"
    return f"the Hugging Face model {manifest['sha256'][:12]}"


def go_on_in_save(
    settings: Settings,
    source: Candidate | None,
    tokenizer: Tokenizer | None,
    data: Mapping[str, Any] | None,
) -> tuple[Settings, list[str]]:
    """Return the settings with the checkpoints in --save to be loaded, where these are of this run; and what to say.

    A run that does not load from --save itself would otherwise begin again, and replace step by step
    what it saved before it was stopped.

    Args:
        settings: The run.
        source: The checkpoint or model that --load names; None where there is none.
        tokenizer: Of its data.
        data: Its data, or None where only another rank has looked at them.

    Raises:
        CheckpointError: --save holds checkpoints of another run, or only damaged ones.
    """
    in_place = same_path(settings.load, settings.save) and not settings.finetune
    if settings.save is None or settings.skip_train or in_place:
        return settings, []
    try:
        if not any(saved_steps(settings.save)):
            return settings, []
    except OSError as error:
        raise CheckpointError(
            f"--save: cannot read {settings.save} ({error.strerror}). Give a directory that can be read."
        ) from error
    there = find_candidates(settings.save)
    newest = _newest(settings, there)
    notes = _of_this_run(settings, source, newest)
    if notes is None:
        return settings, []
    resumed = dataclasses.replace(settings, load=settings.save, finetune=False, ckpt_step=None)
    try:
        check_can_continue(newest, resumed, tokenizer, data)
    except CheckpointError as error:
        raise CheckpointError(
            f"--save: {settings.save} holds checkpoints with which this run cannot go on: "
            f"{error} Or give another directory."
        ) from error
    return resumed, notes


def _newest(settings: Settings, there: Candidates) -> Candidate:
    """Return the checkpoint in --save with which a run would go on.

    Raises:
        CheckpointError: There is none, but others that this run would replace.
    """
    if there.usable and not there.usable[0].weights_only:
        return there.usable[0]
    sentences = " ".join(there.passed_over(None)) or "they are weights only."
    raise CheckpointError(
        f"--save: {settings.save} holds checkpoints that this run would replace and cannot go on from: "
        f"{sentences} Give another directory, or take them away."
    )


def _of_this_run(
    settings: Settings, source: Candidate | None, newest: Candidate
) -> list[str] | None:
    """Return what to say when ``newest`` is this run's; None where the run is to go on from ``source``, which is newer.

    Raises:
        CheckpointError: It is another run's.
    """
    said, manifest = (
        f"--save {settings.save} holds checkpoints of this run up to step {newest.step}",
        newest.manifest,
    )
    if source is not None and not takes_weights_only(source, settings):
        if manifest["run_id"] == source.manifest["run_id"]:
            return (
                None
                if newest.saved_at < source.saved_at
                else [f"{said}: going on from them, not from --load {settings.load}"]
            )
        raise CheckpointError(
            f"--save: {settings.save} holds checkpoints up to step {newest.step} of run {manifest['run_id']}, and "
            f"--load names run {source.manifest['run_id']}. " + ELSEWHERE.format(settings.save)
        )
    ours, theirs = start_of(settings, source), manifest.get(START)
    if theirs is not None and theirs != ours:
        raise CheckpointError(
            f"--save: {settings.save} holds checkpoints up to step {newest.step} of another run: it started from "
            f"{theirs}, this one from {ours}. " + ELSEWHERE.format(settings.save)
        )
    notes = [
        f"{said}: going on from them" + (f", not from {settings.load}" if settings.load else "")
    ]
    if theirs is None:
        notes.append(
            "note: an older version saved them, which did not write what a run started from; they are taken for this run's"
        )
    return notes
