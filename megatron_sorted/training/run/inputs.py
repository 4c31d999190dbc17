"""Everything a run reads or writes, opened and checked before any process group starts."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.checkpoint.candidates import Candidate, Candidates, find_candidates
from megatron_sorted.checkpoint.layout import saved_steps
from megatron_sorted.conversion.network import is_hugging_face
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
from megatron_sorted.settings.derived import data_blend, data_prefixes
from megatron_sorted.settings.exit_distillation import check_top_k
from megatron_sorted.settings.run import Settings
from megatron_sorted.text.prompt_form import PromptForm, check_rows, check_tokens
from megatron_sorted.text.tokenizer.fit import surplus_line
from megatron_sorted.training.run.hugging_face import check_export, hugging_face_candidate
from megatron_sorted.training.run.resume import check_can_continue, settle_document_masks
from megatron_sorted.training.run.same_run import go_on_in_save
from megatron_sorted.training.step.teacher import check_teacher


@dataclass(frozen=True)
class Inputs:
    """What was found.

    Attributes:
        settings: Of the run, with the vocabulary resolved.
        vocab_size: Real tokens, before padding.
        tokenizer: Of the data, if there is one.
        data: What the data are, for checkpoints; None on all ranks but the first, which reads the files once for all.
        checkpoints: Those the run may continue from; None to start afresh.
        samples: To train on; None with ``skip_train``.
        eval_sets: By name, evaluated on the way and at the end.
        test_sets: By name, evaluated at the end only.
        notes: Lines for the log.
        going_on: Lines that say from which checkpoints in --save the run goes on, where --load does not name them.
        form: In which the training data's conversations are written; None where they do not say.
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
    going_on: tuple[str, ...] = ()
    form: PromptForm | None = None


def open_inputs(settings: Settings) -> Inputs:
    """Return what the run works with.

    Raises:
        SortedError: Something is missing, damaged or does not fit.
    """
    tokenizer = open_tokenizer(settings)
    notes = notes_on_tokenizer(tokenizer, settings)
    vocab_size = settings.vocab_size or (tokenizer.vocab_size if tokenizer else 0)
    if not vocab_size:
        raise SettingsError(
            "--vocab-size: the vocabulary is unknown without a tokenizer. Give --tokenizer-model or --vocab-size."
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
    check_context_parallel(
        settings,
        {
            "the training data": samples,
            **{f"set {name!r}": one.source for name, one in (eval_sets | test_sets).items()},
        },
    )
    first = int(os.environ.get("RANK", 0)) == 0
    data = (
        data_identity(settings)
        if first and (settings.save or settings.load) and not settings.skip_train
        else None
    )
    checkpoints = find_checkpoints(settings, tokenizer, data)
    resumed, going_on = go_on_in_save(settings, newest_of(checkpoints), tokenizer, data)
    if resumed is not settings:
        settings, checkpoints = resumed, find_checkpoints(resumed, tokenizer, data)
    check_export(settings)
    if settings.save:
        check_writable("--save", Path(settings.save))
    if settings.metrics_file:
        check_writable("--metrics-file", Path(settings.metrics_file).parent)
    form, lines = open_form(settings, tokenizer, vocab_size)
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
        tuple(going_on),
        form,
    )


def check_context_parallel(settings: Settings, sources: Mapping[str, SampleSource | None]) -> None:
    """Check that no sample holds documents that must be kept apart where attention runs across processes.

    Raises:
        SettingsError: One does.
    """
    packed = [name for name, source in sources.items() if source is not None and source.packs]
    if settings.context_parallel_size == 1 or not packed:
        return
    why = (
        f"documents of {packed[0]} are to be kept apart (--reset-attention-mask, or the checkpoint was trained so)"
        if settings.reset_attention_mask
        else f"{packed[0]} are packed instructions"
    )
    raise SettingsError(
        f"--context-parallel-size: {settings.context_parallel_size}, but {why}, and attention across context parallel "
        "processes knows no documents. Use 1, or train on text with --no-reset-attention-mask."
    )


def open_form(
    settings: Settings, tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[PromptForm | None, list[str]]:
    """Return the form that the training data teach, and lines about it.

    Raises:
        DataError: A summary of data is damaged, or the model or the tokenizer cannot write the form's tokens.
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
    """Return the tokenizer the settings name, or None where none is needed.

    Raises:
        DataError: The tokenizer is missing or damaged.
    """
    if settings.tokenizer_model is None:
        return None
    return load_tokenizer(settings.tokenizer_type, settings.tokenizer_model, settings.vocab_size)


def notes_on_tokenizer(tokenizer: Tokenizer | None, settings: Settings) -> tuple[str, ...]:
    """Return lines about how the tokenizer is read, and tokens of it that the model has no row for.

    Raises:
        DataError: Texts can have ids that the model has no row for.
    """
    if tokenizer is None:
        return ()
    rows = settings.vocab_size
    line = None if rows is None else surplus_line(tokenizer, rows, "--tokenizer-model")
    return tokenizer.notes if line is None else (*tokenizer.notes, line)


def start_from_pretrained(settings: Settings) -> Settings:
    """Return the settings with the weights of --pretrained-checkpoint to be taken, where the run has no checkpoint of its own yet."""
    if settings.pretrained_checkpoint is None or (
        settings.load is not None and saved_steps(settings.load)
    ):
        return settings
    return dataclasses.replace(settings, load=settings.pretrained_checkpoint, finetune=True)


def newest_of(checkpoints: Candidates | None) -> Candidate | None:
    """Return the checkpoint that a run would take if all its files are sound; None to start afresh."""
    return checkpoints.usable[0] if checkpoints is not None and checkpoints.usable else None


def find_checkpoints(
    settings: Settings, tokenizer: Tokenizer | None, data: dict[str, Any] | None
) -> Candidates | None:
    """Return the checkpoints the run may continue from, best first; None to start afresh.

    Raises:
        CheckpointError: There is none although there should be, or the best one does not fit this run.
    """
    if settings.load is None:
        return None
    root = Path(settings.load)
    flag = (
        "--pretrained-checkpoint"
        if same_path(settings.load, settings.pretrained_checkpoint)
        else "--load"
    )
    # where --load and --save are the same, a job script can be submitted again and again, the first time too
    same_as_save = same_path(root, settings.save)
    try:
        if not root.is_dir() and not same_as_save:
            raise CheckpointError(
                f"{flag}: {root} is not a directory. Give the directory that --save of another run wrote to."
            )
        found = (
            Candidates([hugging_face_candidate(root, settings)])
            if is_hugging_face(root)
            else find_candidates(root, settings.ckpt_step)
        )
    except OSError as error:
        raise CheckpointError(
            f"{flag}: cannot read {root} ({error.strerror}). Give a directory that can be read."
        ) from error
    if found.usable:
        check_can_continue(found.usable[0], settings, tokenizer, data)
        return found
    if found.skipped:
        raise CheckpointError(
            f"{flag}: {root} holds no complete checkpoint: {' '.join(found.passed_over(None))} Restore one, or give "
            "another directory."
        )
    if settings.exit_on_missing_checkpoint or settings.finetune or settings.skip_train:
        raise CheckpointError(
            f"{flag}: {root} holds no checkpoint. Give the directory that --save of another run wrote to."
        )
    return None


def check_writable(flag: str, directory: Path) -> None:
    """Check that a file can be written in ``directory``, which is made if it is missing.

    Raises:
        SettingsError: It cannot; hours of training would be lost at the first checkpoint.
    """
    trial = directory / f".trial.{os.environ.get('RANK', 0)}.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"\0")
        trial.unlink()
    except OSError as error:
        raise SettingsError(
            f"{flag}: cannot write in {directory} ({error.strerror}). Give a directory that can be written."
        ) from error
