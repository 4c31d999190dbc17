"""The models, texts, questions and tasks that the options of ``megatron-sorted evaluate`` name.

Everything is read and checked before the first model is loaded.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.commands.options.evaluation import DEFAULT_SEQ_LENGTH
from megatron_sorted.commands.options.position_checks import check_positions
from megatron_sorted.commands.options.positions import read_positions
from megatron_sorted.conversion.exporting import DTYPES_BY_NAME
from megatron_sorted.conversion.hugging_face.families import max_length_of_config, read_config
from megatron_sorted.conversion.staging import check_destination
from megatron_sorted.decoding.native.choice import native_kind
from megatron_sorted.errors import SettingsError
from megatron_sorted.evaluation.documents import read_documents
from megatron_sorted.evaluation.evaluate import Measures, QuestionSet, Subject
from megatron_sorted.evaluation.harness import Harness
from megatron_sorted.evaluation.heads import HeadTraining
from megatron_sorted.evaluation.prepared import (
    PreparedData,
    sequence_length,
    settings_of_checkpoint,
)
from megatron_sorted.evaluation.questions import (
    TEMPLATE,
    as_conversation,
    check_template,
    choose_examples,
    read_questions,
    write_prompts,
)
from megatron_sorted.exported.checkpoint_as_directory import as_hugging_face_directory
from megatron_sorted.exported.exit_plan import plan_exits
from megatron_sorted.exported.generation_defaults import generation_defaults_of
from megatron_sorted.exported.tokenizer import open_tokenizer
from megatron_sorted.settings.derived import MASKS, split_ranges
from megatron_sorted.settings.run import Settings


def name_subjects(values: argparse.Namespace) -> list[Subject]:
    """Return the models to evaluate, each with a unique name.

    Raises:
        SettingsError: Two models have the same name.
        CheckpointError: A directory holds no model.
    """
    subjects = []
    for text, is_baseline in [
        *((text, False) for text in values.models),
        *((text, True) for text in values.baseline),
    ]:
        name, equals, path = text.partition("=")
        if not equals or "/" in name:
            name, path = "", text
        heads = values.train_heads is not None and is_baseline == bool(values.baseline)
        subjects.append(
            Subject(
                name or Path(path).resolve().name,
                as_hugging_face_directory(Path(path)),
                is_baseline,
                heads,
            )
        )
    names = [
        name
        for subject in subjects
        for name in [subject.name, *[f"{subject.name}+ICT"] * subject.with_heads]
    ]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(
                f"two models are called {name}. Give one another name: NAME=DIRECTORY."
            )
    if values.save_heads and sum(subject.with_heads for subject in subjects) != 1:
        raise SettingsError(
            "--save-heads writes one directory, of one model with --train-heads. "
            "Train heads of one model at a time."
        )
    return subjects


def read_measures(values: argparse.Namespace, subjects: Sequence[Subject]) -> Measures:
    """Read and check all files, and return everything to be measured.

    Raises:
        SortedError: An option or a file cannot be used.
    """
    forms = []
    for subject in subjects:
        plan_exits(subject.directory, values.depths)
        forms.append(
            generation_defaults_of(
                subject.directory,
                open_tokenizer(subject.directory, values.tokenizer),
                values.prompt_template,
            )
        )
    in_templates = values.question_template is None and all(
        form.is_stored or values.prompt_template for form in forms
    )
    if values.shots is None:
        values.shots = 0 if in_templates else 5
    allowed = {
        subject.name: max_length_of_config(read_config(subject.directory)) for subject in subjects
    }
    longest = min(DEFAULT_SEQ_LENGTH, *allowed.values())
    prepared = _read_prepared(values, longest)
    seq_length = values.seq_length or (prepared.settings.seq_length if prepared else longest)
    for name, length in allowed.items():
        if seq_length > length:
            raise SettingsError(
                f"--seq-length: {seq_length} is more than the {length} positions of {name}. "
                f"Use at most {length}."
            )
    if values.stride and values.stride > seq_length:
        raise SettingsError(
            f"--stride: {values.stride} is more than --seq-length {seq_length}, so tokens would "
            "be left out. Use less."
        )
    positions = read_positions(values, longest)
    if values.save_heads:
        check_destination(values.save_heads, values.overwrite, 0)
    if values.questions:  # a library that is needed and cannot be used is refused at once
        native_kind(values.native, DTYPES_BY_NAME[values.dtype], "cpu")
    as_turns = values.question_template is None
    values.question_template = (values.question_template or TEMPLATE).replace("\\n", "\n")
    template = check_template(values.question_template)
    examples = read_questions(values.shots_from) if values.shots_from else None
    questions = {}
    for name, path in _by_name(values.questions).items():
        in_file = read_questions(path)
        used = in_file[: values.num_questions]
        shots = choose_examples(used, values.shots, examples or in_file, values.seed)
        questions[name] = QuestionSet(
            used,
            write_prompts(used, values.shots, examples or in_file, template, values.seed),
            [as_conversation(*pair) for pair in zip(used, shots, strict=True)] if as_turns else [],
        )
    texts = {
        name: read_documents(path, values.separator, values.limit)
        for name, path in _by_name(values.text).items()
    }
    if positions is not None:
        check_positions(values, positions, subjects, forms, texts)
    harness = Harness(values.tasks, values.tasks_path) if values.tasks else None
    if harness is not None:
        harness.check(allowed)
    heads = read_documents(values.train_heads, values.separator) if values.train_heads else None
    training = HeadTraining(
        values.train_heads_epochs,
        values.train_heads_lr,
        values.train_heads_batch_size,
        seed=values.seed,
    )
    return Measures(
        texts,
        questions,
        seq_length,
        values.stride or seq_length,
        prepared,
        positions,
        tuple(values.depths) if values.depths else None,
        DTYPES_BY_NAME[values.dtype],
        values.tokenizer,
        values.prompt_template,
        values.append_eos,
        values.batch_tokens,
        values.batch_size,
        values.max_new_tokens,
        values.native,
        harness,
        values.task_shots,
        values.task_limit,
        heads,
        training,
        values.save_heads,
        values.overwrite,
    )


def _read_prepared(values: argparse.Namespace, default_length: int) -> PreparedData | None:
    """Return the prepared data and the settings of their run; None if no --data-path is given.

    Settings that the command line lacks are those of the first model with checkpoints, else those
    in the summary of the data.

    Raises:
        SettingsError: --split or a mask is given without --data-path, or --split is not a list of
            shares.
    """
    given = {
        name: getattr(values, name)
        for name in ("split", *MASKS)
        if getattr(values, name) is not None
    }
    if not values.data_path:
        if given:
            raise SettingsError(
                f"--{next(iter(given)).replace('_', '-')}: applies to prepared data. "
                "Give --data-path as well, or leave it out."
            )
        return None
    of_run = next(
        filter(
            None,
            (
                settings_of_checkpoint(Path(text.partition("=")[2] or text))
                for text in values.models
            ),
        ),
        {},
    )
    length = (
        values.seq_length
        or of_run.get("seq_length")
        or sequence_length(values.data_path)
        or default_length
    )
    settings = Settings(
        **{
            **of_run,
            **{name: given[name] for name in given if name != "split"},
            "seq_length": length,
        }
    )
    files = (
        {"data_path": tuple(values.data_path), "split": values.split}
        if values.split
        else {"valid_data_path": tuple(values.data_path)}
    )
    settings = dataclasses.replace(settings, **files)
    split_ranges(settings)
    return PreparedData(tuple(values.data_path), settings, values.limit)


def _by_name(paths: Sequence[Path]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for path in paths:
        name = path.name.removesuffix(".gz")
        name = name.rsplit(".", 1)[0] or name
        if name in named:
            raise SettingsError(f"{named[name]} and {path} have the same name. Rename one of them.")
        named[name] = path
    return named
