"""Everything a run reads or writes, opened and checked before any process group starts."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.checkpoint.candidates import Candidate, Candidates, find_candidates
from megatron_sorted.checkpoint.layout import saved_steps
from megatron_sorted.conversion.directory_kind import is_hugging_face
from megatron_sorted.data.batches import (
    make_document_masks,
    make_eval_sets,
    make_test_sets,
    open_train_samples,
)
from megatron_sorted.data.identity import data_identity
from megatron_sorted.data.prepared import check_same_tokenizer, form_of_data
from megatron_sorted.data.samples.dataset import EvaluationSet
from megatron_sorted.data.samples.sample import SampleSource
from megatron_sorted.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sorted.errors import CheckpointError, SettingsError
from megatron_sorted.files import same_path
from megatron_sorted.settings.averaging import averaging_hints
from megatron_sorted.settings.derived import data_blend, data_prefixes
from megatron_sorted.settings.exit_distillation import check_top_k
from megatron_sorted.settings.run import Settings
from megatron_sorted.text.prompt_form import PromptForm, check_rows, check_tokens
from megatron_sorted.text.tokenizer.fit import surplus_line
from megatron_sorted.training.run.hugging_face import check_export, hugging_face_candidate
from megatron_sorted.training.run.resume import check_can_continue, settle_document_masks
from megatron_sorted.training.run.same_run import resume_in_save, start_of
from megatron_sorted.training.step.teacher import check_teacher


@dataclass(frozen=True)
class Inputs:
    """The opened and checked inputs of a run.

    Attributes:
        settings: The settings, with the vocabulary size resolved.
        vocab_size: Number of real tokens, before padding.
        tokenizer: The tokenizer of the data, if there is one.
        data: The identity of the data, for checkpoints; None on all ranks but the first, which
            reads the files once for all.
        checkpoints: The checkpoints that the run may resume from; None to start afresh.
        samples: The training samples; None with ``skip_train``.
        eval_sets: {name: set} evaluated during training and at the end.
        test_sets: {name: set} evaluated at the end only.
        notes: Lines for the log.
        resume_lines: Lines about the checkpoints in --save from which the run resumes, where --load
            does not name them.
        form: The prompt form of the training data's conversations; None if the data name none.
    """

    settings: Settings
    vocab_size: int
    tokenizer: Tokenizer | None
    data: dict[str, Any] | None
    checkpoints: Candidates | None
    samples: SampleSource | None
    eval_sets: dict[str, EvaluationSet]
    test_sets: dict[str, EvaluationSet]
    notes: tuple[str, ...] = ()
    resume_lines: tuple[str, ...] = ()
    form: PromptForm | None = None


def open_inputs(settings: Settings) -> Inputs:
    """Open and check everything that a run reads or writes.

    Raises:
        SortedError: An input is missing, is damaged or does not fit.
    """
    tokenizer = open_tokenizer(settings)
    notes = notes_on_tokenizer(tokenizer, settings)
    vocab_size = settings.vocab_size or (tokenizer.vocab_size if tokenizer else 0)
    if not vocab_size:
        raise SettingsError(
            "--vocab-size: the vocabulary is unknown without a tokenizer. "
            "Give --tokenizer-model or --vocab-size."
        )
    settings = start_from_pretrained(dataclasses.replace(settings, vocab_size=vocab_size))
    check_top_k(settings)
    check_teacher(settings)
    if tokenizer is not None:
        check_same_tokenizer(
            (*data_prefixes(settings), *settings.valid_data_path, *settings.test_data_path),
            tokenizer,
        )
    settings = settle_document_masks(settings)
    masks = make_document_masks(settings, tokenizer)
    samples = None if settings.skip_train else open_train_samples(settings, vocab_size, masks)
    eval_sets = make_eval_sets(settings, vocab_size, masks)
    test_sets = make_test_sets(settings, vocab_size, masks)
    sources = {f"set {name!r}": one.source for name, one in (eval_sets | test_sets).items()}
    check_context_parallel(settings, {"the training data": samples, **sources})
    is_first = int(os.environ.get("RANK", 0)) == 0
    has_checkpoints = (settings.save or settings.load) and not settings.skip_train
    data = data_identity(settings) if is_first and has_checkpoints else None
    settings, checkpoints, _, resume_lines = search_checkpoints(settings, tokenizer, data)
    check_export(settings)
    if settings.save:
        check_writable("--save", Path(settings.save))
    if settings.metrics_file:
        check_writable("--metrics-file", Path(settings.metrics_file).parent)
    form, lines = open_form(settings, tokenizer, vocab_size)
    lines = [*lines, *averaging_hints(settings)]
    return Inputs(
        settings,
        vocab_size,
        tokenizer,
        data,
        checkpoints,
        samples,
        eval_sets,
        test_sets,
        (*notes, *lines),
        tuple(resume_lines),
        form,
    )


def check_context_parallel(settings: Settings, sources: Mapping[str, SampleSource | None]) -> None:
    """Check that context parallelism meets no samples that keep documents apart.

    Raises:
        SettingsError: A source has such samples.
    """
    packed = [name for name, source in sources.items() if source is not None and source.packs]
    if settings.context_parallel_size == 1 or not packed:
        return
    why = (
        f"documents of {packed[0]} are to be kept apart "
        "(--reset-attention-mask, or the checkpoint was trained so)"
        if settings.reset_attention_mask
        else f"{packed[0]} are packed instructions"
    )
    raise SettingsError(
        f"--context-parallel-size: {settings.context_parallel_size}, but {why}, and attention "
        "across context parallel processes knows no documents. Use 1, or train on text with "
        "--no-reset-attention-mask."
    )


def open_form(
    settings: Settings, tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[PromptForm | None, list[str]]:
    """Return the prompt form that the training data teach, and lines about it.

    Raises:
        DataError: A summary of data is damaged, or the model or the tokenizer cannot write the
            form's tokens.
    """
    if settings.skip_train:
        return None, []
    form, notes = form_of_data(
        data_blend(settings) or [(1.0, prefix) for prefix in settings.data_path]
    )
    if form is not None:
        where = f"--data-path {' '.join(settings.data_path)}"
        check_rows(form, vocab_size, where)
        if tokenizer is not None:
            check_tokens(form, tokenizer, where)
    return form, notes


def open_tokenizer(settings: Settings) -> Tokenizer | None:
    """Load the tokenizer that the settings name; return None where none is needed.

    Raises:
        DataError: The tokenizer is missing or damaged.
    """
    if settings.tokenizer_model is None:
        return None
    return load_tokenizer(settings.tokenizer_type, settings.tokenizer_model, settings.vocab_size)


def notes_on_tokenizer(tokenizer: Tokenizer | None, settings: Settings) -> tuple[str, ...]:
    """Return lines about how the tokenizer is read, and its tokens without a row in the model.

    Raises:
        DataError: Texts can contain tokens that the model has no row for.
    """
    if tokenizer is None:
        return ()
    rows = settings.vocab_size
    line = None if rows is None else surplus_line(tokenizer, rows, "--tokenizer-model")
    return tokenizer.notes if line is None else (*tokenizer.notes, line)


def start_from_pretrained(settings: Settings) -> Settings:
    """Return settings that load --pretrained-checkpoint if the run has no checkpoint of its own."""
    if settings.pretrained_checkpoint is None or (
        settings.load is not None and saved_steps(settings.load)
    ):
        return settings
    return dataclasses.replace(settings, load=settings.pretrained_checkpoint, finetune=True)


def newest_of(checkpoints: Candidates | None) -> Candidate | None:
    """Return the checkpoint a run would take if none is damaged; None to start afresh."""
    return checkpoints.usable[0] if checkpoints is not None and checkpoints.usable else None


def search_checkpoints(
    settings: Settings, tokenizer: Tokenizer | None, data: dict[str, Any] | None
) -> tuple[Settings, Candidates | None, str, list[str]]:
    """Return where the run can start, as the disk is now.

    Returns:
        The settings, with --load set to --save if the run resumes from there; the checkpoints as
        ``find_checkpoints`` returns them; what the run starts from at step 0; and lines for the
        log.

    Raises:
        CheckpointError: A checkpoint is required or present, and does not fit this run.
    """
    checkpoints = find_checkpoints(settings, tokenizer, data)
    source = newest_of(checkpoints)
    resumed, lines = resume_in_save(settings, source, tokenizer, data)
    if resumed is not settings:
        checkpoints = find_checkpoints(resumed, tokenizer, data)
    return resumed, checkpoints, start_of(settings, source), lines


def find_checkpoints(
    settings: Settings, tokenizer: Tokenizer | None, data: dict[str, Any] | None
) -> Candidates | None:
    """Return the checkpoints that the run may resume from, best first; None to start afresh.

    Raises:
        CheckpointError: There is none although one is required, or the best one does not fit this
            run.
    """
    if settings.load is None:
        return None
    root = Path(settings.load)
    is_pretrained = same_path(settings.load, settings.pretrained_checkpoint)
    flag = "--pretrained-checkpoint" if is_pretrained else "--load"
    try:
        # where --load and --save are the same, a job script can be submitted again and again, the
        # first time too
        if not root.is_dir() and not same_path(root, settings.save):
            raise CheckpointError(
                f"{flag}: {root} is not a directory. Give the directory that --save of another run "
                "wrote to."
            )
        candidates = (
            Candidates([hugging_face_candidate(root, settings)])
            if is_hugging_face(root)
            else find_candidates(root, settings.ckpt_step)
        )
    except OSError as error:
        raise CheckpointError(
            f"{flag}: cannot read {root} ({error.strerror}). Give a directory that can be read."
        ) from error
    if candidates.usable:
        check_can_continue(candidates.usable[0], settings, tokenizer, data)
        return candidates
    if candidates.skipped:
        raise CheckpointError(
            f"{flag}: {root} holds no complete checkpoint: "
            f"{' '.join(candidates.passed_over(None))} Restore one, or give another directory."
        )
    if settings.exit_on_missing_checkpoint or settings.finetune or settings.skip_train:
        raise CheckpointError(
            f"{flag}: {root} holds no checkpoint. Give the directory that --save of another run "
            "wrote to."
        )
    return None


def check_writable(flag: str, directory: Path) -> None:
    """Check that a file can be written in ``directory``; create the directory if it is missing.

    Without this, hours of training could be lost at the first checkpoint.

    Raises:
        SettingsError: No file can be written there.
    """
    trial = directory / f".trial.{os.environ.get('RANK', 0)}.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"\0")
        trial.unlink()
    except OSError as error:
        raise SettingsError(
            f"{flag}: cannot write in {directory} ({error.strerror}). "
            "Give a directory that can be written."
        ) from error
