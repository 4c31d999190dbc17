"""The options of tools/evaluate.py, and what they name: models, texts, questions, tasks; all is checked before a model is loaded."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.conversion.aside import check_destination
from megatron_sorted.conversion.convert import KINDS
from megatron_sorted.conversion.families import max_length_of_config, read_config
from megatron_sorted.errors import SettingsError
from megatron_sorted.evaluation.documents import read_documents
from megatron_sorted.evaluation.evaluate import Measures, QuestionSet, Subject
from megatron_sorted.evaluation.harness import Harness
from megatron_sorted.evaluation.prepared import MASKS, PreparedData, sequence_length, settings_of_checkpoint
from megatron_sorted.evaluation.questions import TEMPLATE, as_conversation, check_template, choose_examples, read_questions, write_prompts
from megatron_sorted.evaluation.train_heads import HeadTraining
from megatron_sorted.exported.form import form_of_model
from megatron_sorted.exported.model_directory import open_model_directory, plan_exits
from megatron_sorted.exported.tokenizer import open_tokenizer
from megatron_sorted.settings.derived import split_ranges
from megatron_sorted.settings.run import Settings

DEFAULT_SEQ_LENGTH = 2048


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _count(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def _rate(text: str) -> float:
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def read_arguments(arguments: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Returns what the command line says."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="directory, or NAME=DIRECTORY")
    parser.add_argument("--baseline", action="append", default=[], metavar="MODEL", help="compare with this model's exits; may be repeated")
    parser.add_argument("--depths", nargs="+", type=int, help="default: exit_layer_indices of config.json, or all; the last layer always")
    parser.add_argument("--dtype", choices=tuple(KINDS), default="float32")
    parser.add_argument("--tokenizer", type=Path, help="directory or sentencepiece file; default: the model's directory")
    parser.add_argument("--output", type=Path, default=Path("runs/evaluation"), help="folder of evaluation.json and .png (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of drawn examples and of the order in which heads are trained")
    text = parser.add_argument_group("held-out text")
    text.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE", help="plain text, or JSON lines (.jsonl, .jsonl.gz)")
    text.add_argument("--separator", help="cuts plain text into documents, as '<|endoftext|>' does; default: a file is one document")
    parser.add_argument("--prompt-template", metavar="FORM",
                        help="form of instructions, conversations and questions: plain, alpaca, chat (the tokenizer's own template) or "
                             "chat:NAME (default: the form that each model was trained in)")
    text.add_argument("--seq-length", type=_positive, help=f"tokens of a window; default: what models allow, up to {DEFAULT_SEQ_LENGTH}")
    text.add_argument("--stride", type=_positive, help="windows start this many tokens apart; default: --seq-length, no overlap")
    text.add_argument("--append-eos", action="store_true", help="count the eos at the end of texts and responses too")
    text.add_argument("--limit", type=_positive, help="only the first documents of each text, samples of each --data-path")
    text.add_argument("--batch-tokens", type=_positive, default=8192, help="tokens of one forward pass (%(default)s)")
    data = parser.add_argument_group("prepared data: the samples, windows and masks of a run's own evaluation")
    data.add_argument("--data-path", nargs="+", default=[], metavar="PREFIX", help="PREFIX.bin and PREFIX.idx of tools/prepare_data.py")
    data.add_argument("--split", metavar="SHARES", help="as the run's, such as 98,2: its validation share; default: the whole files")
    for name in MASKS:
        data.add_argument(f"--{name.replace('_', '-')}", action=argparse.BooleanOptionalAction, default=None,
                          help="as the run's; default: as the checkpoint was trained, else the default of training")
    asked = parser.add_argument_group("closed-book questions")
    asked.add_argument("--questions", nargs="+", type=Path, default=[], metavar="FILE", help="JSON lines: question, answer, aliases")
    asked.add_argument("--shots", type=_count, help="worked examples before each question (default: 0 where all models are asked in the "
                                                    "form they were trained in, else 5)")
    asked.add_argument("--shots-from", type=Path, metavar="FILE", help="file of the examples; default: other questions of the same file")
    asked.add_argument("--question-template", help="ask in this text, whatever form a model was trained in; \\n is a line break "
                                                   f"(default, for models of no form: {TEMPLATE!r})")
    asked.add_argument("--num-questions", type=_positive, help="only the first questions of each file")
    asked.add_argument("--max-new-tokens", type=_positive, default=32, help="of an answer (%(default)s)")
    asked.add_argument("--batch-size", type=_positive, default=16, help="questions, or requests of a task, at a time (%(default)s)")
    tasks = parser.add_argument_group("lm-evaluation-harness")
    tasks.add_argument("--tasks", type=lambda names: [name for name in names.split(",") if name], default=[], metavar="NAME[,NAME]")
    tasks.add_argument("--tasks-path", type=Path, metavar="DIR", help="folder with the YAML files of local tasks")
    tasks.add_argument("--task-shots", type=_count, help="default: as the task says")
    tasks.add_argument("--task-limit", type=_positive, help="only the first samples of each task")
    heads = parser.add_argument_group("SFT+ICT: own heads on frozen layers, for the baselines, or for the models if there is no baseline")
    heads.add_argument("--train-heads", type=Path, metavar="TEXT", help="train a norm and a head for each exit on this text")
    heads.add_argument("--train-heads-epochs", type=_positive, default=1)
    heads.add_argument("--train-heads-lr", type=_rate, help="default: 1 / hidden size")
    heads.add_argument("--train-heads-batch-size", type=_positive, default=8, help="windows of a step (%(default)s)")
    heads.add_argument("--save-heads", type=Path, metavar="DIR", help="write the model with these heads as a nested directory")
    heads.add_argument("--overwrite", action="store_true", help="replace what is at --save-heads")
    return parser.parse_args(arguments)


def name_subjects(values: argparse.Namespace) -> list[Subject]:
    """Returns the models to evaluate, each with a name of its own.

    Raises:
        SettingsError: Two models have one name.
        CheckpointError: A directory is no model.
    """
    subjects = []
    for text, is_baseline in [*((text, False) for text in values.models), *((text, True) for text in values.baseline)]:
        name, equals, path = text.partition("=")
        if not equals or "/" in name:
            name, path = "", text
        heads = values.train_heads is not None and is_baseline == bool(values.baseline)
        subjects.append(Subject(name or Path(path).resolve().name, open_model_directory(Path(path)), is_baseline, heads))
    names = [name for subject in subjects for name in [subject.name, *[f"{subject.name}+ICT"] * subject.with_heads]]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"two models are called {name}. Give one another name: NAME=DIRECTORY.")
    if values.save_heads and sum(subject.with_heads for subject in subjects) != 1:
        raise SettingsError("--save-heads writes one directory, of one model with --train-heads. Train heads of one model at a time.")
    return subjects


def read_measures(values: argparse.Namespace, subjects: Sequence[Subject]) -> Measures:
    """Returns everything that is measured; all files are read and checked before the first model is loaded.

    Raises:
        SortedError: An option or a file cannot be used.
    """
    if not (values.text or values.data_path or values.questions or values.tasks):
        raise SettingsError("nothing to measure. Give --text, --data-path, --questions or --tasks.")
    forms = []
    for subject in subjects:
        plan_exits(subject.directory, values.depths)
        forms.append(form_of_model(subject.directory, open_tokenizer(subject.directory, values.tokenizer), values.prompt_template))
    in_forms = values.question_template is None and all(form.is_stored or values.prompt_template for form in forms)
    if values.shots is None:
        values.shots = 0 if in_forms else 5
    allowed = {subject.name: max_length_of_config(read_config(subject.directory)) for subject in subjects}
    longest = min(DEFAULT_SEQ_LENGTH, *allowed.values())
    prepared = _read_prepared(values, longest)
    seq_length = values.seq_length or (prepared.settings.seq_length if prepared else longest)
    for name, length in allowed.items():
        if seq_length > length:
            raise SettingsError(f"--seq-length: {seq_length} is more than the {length} positions of {name}. Use at most {length}.")
    if values.stride and values.stride > seq_length:
        raise SettingsError(f"--stride: {values.stride} is more than --seq-length {seq_length}, so tokens would be left out. Use less.")
    if values.save_heads:
        check_destination(values.save_heads, values.overwrite, 0)
    as_turns = values.question_template is None
    values.question_template = (values.question_template or TEMPLATE).replace("\\n", "\n")
    template = check_template(values.question_template)
    examples = read_questions(values.shots_from) if values.shots_from else None
    questions = {}
    for name, path in _by_name(values.questions).items():
        found = read_questions(path)
        asked = found[:values.num_questions]
        some = choose_examples(asked, values.shots, examples or found, values.seed)
        questions[name] = QuestionSet(asked, write_prompts(asked, values.shots, examples or found, template, values.seed),
                                      [as_conversation(*pair) for pair in zip(asked, some, strict=True)] if as_turns else [])
    texts = {name: read_documents(path, values.separator, values.limit) for name, path in _by_name(values.text).items()}
    harness = Harness(values.tasks, values.tasks_path) if values.tasks else None
    if harness is not None:
        harness.check(allowed)
    heads = read_documents(values.train_heads, values.separator) if values.train_heads else None
    training = HeadTraining(values.train_heads_epochs, values.train_heads_lr, values.train_heads_batch_size, seed=values.seed)
    return Measures(
        texts, questions, seq_length, values.stride or seq_length, prepared,
        tuple(values.depths) if values.depths else None, KINDS[values.dtype],
        values.tokenizer, values.prompt_template, values.append_eos, values.batch_tokens, values.batch_size, values.max_new_tokens,
        harness, values.task_shots, values.task_limit, heads, training,
        values.save_heads, values.overwrite)


def _read_prepared(values: argparse.Namespace, default_length: int) -> PreparedData | None:
    """Return the prepared data with the settings of the run whose evaluation is done; None where none are named.

    What was not given comes from the first of the models that is a directory of checkpoints, then from the summary of the data.

    Raises:
        SettingsError: --split or a mask is given without --data-path, or --split is no list of shares.
    """
    given = {name: getattr(values, name) for name in ("split", *MASKS) if getattr(values, name) is not None}
    if not values.data_path:
        if given:
            raise SettingsError(f"--{next(iter(given)).replace('_', '-')}: says how prepared data are read. Give --data-path as well, or "
                                "leave it out.")
        return None
    of_run = next(filter(None, (settings_of_checkpoint(Path(text.partition("=")[2] or text)) for text in values.models)), {})
    length = values.seq_length or of_run.get("seq_length") or sequence_length(values.data_path) or default_length
    settings = Settings(**{**of_run, **{name: given[name] for name in given if name != "split"}, "seq_length": length})
    files = {"data_path": tuple(values.data_path), "split": values.split} if values.split else {"valid_data_path": tuple(values.data_path)}
    settings = dataclasses.replace(settings, **files)
    split_ranges(settings)
    return PreparedData(tuple(values.data_path), settings, values.limit)


def _by_name(paths: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        name = path.name.removesuffix(".gz")
        name = name.rsplit(".", 1)[0] or name
        if name in found:
            raise SettingsError(f"{found[name]} and {path} have the same name. Rename one of them.")
        found[name] = path
    return found
