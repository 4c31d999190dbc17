"""The options of ``megatron-sorted evaluate``, with the checks that need no slow imports."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sorted.commands.options.positions import add_position_options, check_position_options
from megatron_sorted.commands.parser import Parser, at_least
from megatron_sorted.conversion.hugging_face.families import DTYPES
from megatron_sorted.decoding.native import CHOICES
from megatron_sorted.errors import SettingsError
from megatron_sorted.evaluation.task_names import check_task_names
from megatron_sorted.settings.derived import MASKS

DEFAULT_SEQ_LENGTH = 2048
KEPT = (
    "dtype",
    "shots",
    "question_template",
    "max_new_tokens",
    "native",
    "seed",
    "separator",
    "questions",
    "train_heads",
    "task_shots",
    "task_limit",
)
"""Options that are recorded in evaluation.json."""
DESCRIPTION = """\
Measure every exit: held-out loss, closed-book questions, tasks. See docs/evaluation.md."""


def _rate(text: str) -> float:
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def plain(value: Any) -> Any:
    """Return an option's value in a form that JSON can hold."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the values of the options.

    Raises:
        SortedError: Nothing is to be measured, or a task is unknown.
    """
    parser = Parser(
        "megatron-sorted evaluate",
        DESCRIPTION,
        "megatron-sorted evaluate nested=runs/a --baseline plain=runs/b --text valid.txt",
        usage="%(prog)s MODEL ... [options]",
    )
    group = parser.add_argument_group("models")
    group.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="Hugging Face directory, checkpoints, or NAME=DIRECTORY",
    )
    group.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="MODEL",
        help="model to compare with; may be repeated",
    )
    group.add_argument(
        "--depths",
        nargs="+",
        type=int,
        metavar="N",
        help="exits to measure (default: those in config.json, else all)",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        metavar="KIND",
        help=f"{', '.join(DTYPES)} (default: %(default)s)",
    )
    group.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="directory or sentencepiece file (default: the model's)",
    )
    group.add_argument(
        "--prompt-template",
        metavar="FORM",
        help="plain, alpaca, chat or chat:NAME (default: as in training)",
    )
    group.add_argument(
        "--output",
        type=Path,
        default=Path("runs/evaluation"),
        metavar="DIR",
        help="folder to write (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="random seed of examples and training of heads (default: 0)",
    )
    text = parser.add_argument_group("held-out text")
    text.add_argument(
        "--text",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="plain text, or JSON lines (.jsonl, .jsonl.gz)",
    )
    text.add_argument(
        "--separator",
        metavar="TEXT",
        help="text between documents (default: a file is one document)",
    )
    text.add_argument(
        "--seq-length",
        type=at_least(1),
        metavar="N",
        help=f"tokens of each window (default: up to {DEFAULT_SEQ_LENGTH})",
    )
    text.add_argument(
        "--stride",
        type=at_least(1),
        metavar="N",
        help="distance between windows (default: --seq-length)",
    )
    text.add_argument(
        "--append-eos", action="store_true", help="count the eos after texts and responses too"
    )
    text.add_argument(
        "--limit",
        type=at_least(1),
        metavar="N",
        help="use only the first N documents or samples of each file",
    )
    text.add_argument(
        "--batch-tokens",
        type=at_least(1),
        default=8192,
        metavar="N",
        help="tokens of one forward pass (default: %(default)s)",
    )
    add_position_options(text)
    text.add_argument(
        "--data-path",
        nargs="+",
        default=[],
        metavar="P",
        help="prepared data P.bin and P.idx, read as in training (with its flags)",
    )
    text.add_argument(
        "--split",
        metavar="SHARES",
        help="the run's, such as 98,2: take the validation share (default: all)",
    )
    for name in MASKS:
        text.add_argument(
            f"--{name.replace('_', '-')}",
            action=argparse.BooleanOptionalAction,
            default=None,
            help=argparse.SUPPRESS,
        )
    questions = parser.add_argument_group("closed-book questions")
    questions.add_argument(
        "--questions",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="JSON lines: question, answer, aliases",
    )
    questions.add_argument(
        "--shots",
        type=at_least(0),
        metavar="N",
        help="examples before each (default: 0 in a trained template, else 5)",
    )
    questions.add_argument(
        "--shots-from",
        type=Path,
        metavar="FILE",
        help="file of the examples (default: the same file)",
    )
    questions.add_argument(
        "--question-template",
        metavar="TEXT",
        help="form of a question (default: the model's, else a plain one)",
    )
    questions.add_argument(
        "--num-questions",
        type=at_least(1),
        metavar="N",
        help="use only the first N questions of each file",
    )
    questions.add_argument(
        "--max-new-tokens",
        type=at_least(1),
        default=32,
        metavar="N",
        help="most tokens of an answer (default: %(default)s)",
    )
    questions.add_argument(
        "--native",
        choices=CHOICES,
        default="auto",
        metavar="WHEN",
        help="compiled library for answers: auto, on, off (default: %(default)s)",
    )
    questions.add_argument(
        "--batch-size",
        type=at_least(1),
        default=16,
        metavar="N",
        help="questions or requests at a time (default: %(default)s)",
    )
    tasks = parser.add_argument_group("lm-evaluation-harness")
    tasks.add_argument(
        "--tasks",
        type=lambda names: [name for name in names.split(",") if name],
        default=[],
        metavar="NAME[,NAME]",
        help="tasks or groups of tasks to run",
    )
    tasks.add_argument(
        "--tasks-path", type=Path, metavar="DIR", help="folder with the YAML files of local tasks"
    )
    tasks.add_argument(
        "--task-shots",
        type=at_least(0),
        metavar="N",
        help="examples before each request (default: the task's)",
    )
    tasks.add_argument(
        "--task-limit",
        type=at_least(1),
        metavar="N",
        help="use only the first N samples of each task",
    )
    heads = parser.add_argument_group(
        "SFT+ICT: own heads on the frozen layers of the baselines, else of the models"
    )
    heads.add_argument(
        "--train-heads",
        type=Path,
        metavar="TEXT",
        help="train a norm and a head for each exit on this text",
    )
    heads.add_argument(
        "--train-heads-epochs",
        type=at_least(1),
        default=1,
        metavar="N",
        help="number of epochs (default: %(default)s)",
    )
    heads.add_argument(
        "--train-heads-lr",
        type=_rate,
        metavar="LR",
        help="learning rate (default: 1 / hidden size)",
    )
    heads.add_argument(
        "--train-heads-batch-size",
        type=at_least(1),
        default=8,
        metavar="N",
        help="windows of each step (default: %(default)s)",
    )
    heads.add_argument(
        "--save-heads",
        type=Path,
        metavar="DIR",
        help="write the model with these heads as a nested model",
    )
    heads.add_argument(
        "--overwrite", action="store_true", help="replace the directory of --save-heads"
    )
    values = parser.parse_args(arguments)
    if not (values.text or values.data_path or values.questions or values.tasks):
        raise SettingsError("nothing to measure. Give --text, --data-path, --questions or --tasks.")
    check_position_options(values)
    if values.tasks:
        check_task_names(values.tasks, values.tasks_path)
    return values
