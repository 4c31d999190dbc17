"""The same command started again: finds this run's checkpoints in --save, to resume from them."""

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

# The manifest's entry for what a run started from; checkpoints of 0.6.0 and before have none.
STARTED_FROM = "start"
ELSEWHERE = "Give another directory, or resume the run that is there by --load {0} --save {0}."


def start_of(settings: Settings, source: Candidate | None) -> str:
    """Return what a run starts from at step 0; the same each time its command is given.

    Args:
        settings: The run.
        source: The checkpoint whose weights it takes; None for random weights.
    """
    if source is None:
        return f"weights drawn with seed {settings.seed}"
    manifest = source.manifest
    if manifest["run_id"]:
        return f"weights of run {manifest['run_id']}"
    return f"the Hugging Face model {manifest['sha256'][:12]}"


def resume_in_save(
    settings: Settings,
    source: Candidate | None,
    tokenizer: Tokenizer | None,
    data: Mapping[str, Any] | None,
) -> tuple[Settings, list[str]]:
    """Return settings that load the checkpoints in --save where these are of this run; and lines.

    A run that does not load from --save itself would otherwise start again, and replace step by
    step what it saved before it was stopped.

    Args:
        settings: The run.
        source: The checkpoint or model that --load names; None where there is none.
        tokenizer: The tokenizer of the run's data.
        data: The identity of the run's data, or None where only another rank has read them.

    Raises:
        CheckpointError: --save holds checkpoints of another run, or only damaged ones.
    """
    in_place = same_path(settings.load, settings.save) and not settings.finetune
    if settings.save is None or settings.skip_train or in_place:
        return settings, []
    try:
        steps = saved_steps(settings.save)
    except OSError as error:
        raise CheckpointError(
            f"--save: cannot read {settings.save} ({error.strerror}). "
            "Give a directory that can be read."
        ) from error
    if not any(steps):  # none, or weights of an import, which is step 0
        if steps and settings.load is None:
            raise CheckpointError(
                f"--save: {settings.save} holds weights at step 0, and without --load this run "
                f"would start from random ones. Give --load {settings.save} to start from them, or "
                "another --save."
            )
        return settings, []
    newest = _newest(settings, find_candidates(settings.save))
    lines = _lines_if_of_this_run(settings, source, newest)
    if lines is None:
        return settings, []
    resumed = dataclasses.replace(settings, load=settings.save, finetune=False, ckpt_step=None)
    try:
        check_can_continue(newest, resumed, tokenizer, data)
    except CheckpointError as error:
        raise CheckpointError(
            f"--save: {settings.save} holds checkpoints from which this run cannot resume: "
            f"{error} Or give another directory."
        ) from error
    return resumed, lines


def _newest(settings: Settings, candidates: Candidates) -> Candidate:
    """Return the checkpoint in --save from which a run would resume.

    Raises:
        CheckpointError: There is none, but others that this run would replace.
    """
    if candidates.usable and not candidates.usable[0].weights_only:
        return candidates.usable[0]
    sentences = " ".join(candidates.passed_over(None)) or "they are weights only."
    raise CheckpointError(
        f"--save: {settings.save} holds checkpoints that this run would replace and cannot resume "
        f"from: {sentences} Give another directory, or remove them."
    )


def _lines_if_of_this_run(
    settings: Settings, source: Candidate | None, newest: Candidate
) -> list[str] | None:
    """Return lines about resuming from ``newest``; None where ``source`` is this run's and newer.

    Raises:
        CheckpointError: ``newest`` is another run's.
    """
    save, manifest = settings.save, newest.manifest
    holds = f"--save {save} holds checkpoints of this run up to step {newest.step}"
    if source is not None and not takes_weights_only(source, settings):
        if manifest["run_id"] != source.manifest["run_id"]:
            raise CheckpointError(
                f"--save: {save} holds checkpoints up to step {newest.step} of run "
                f"{manifest['run_id']}, and --load names run {source.manifest['run_id']}. "
                + ELSEWHERE.format(save)
            )
        if newest.saved_at < source.saved_at:
            return None
        return [f"{holds}: resuming from them, not from --load {settings.load}"]
    ours, theirs = start_of(settings, source), manifest.get(STARTED_FROM)
    if theirs is not None and theirs != ours:
        raise CheckpointError(
            f"--save: {save} holds checkpoints up to step {newest.step} of another run: it started "
            f"from {theirs}, this one from {ours}. " + ELSEWHERE.format(save)
        )
    instead = f", not from {settings.load}" if settings.load else ""
    lines = [f"{holds}: resuming from them{instead}"]
    if theirs is None:
        lines.append(
            "note: an older version saved them, which did not record what a run started from; they "
            "are taken for this run's"
        )
    return lines
