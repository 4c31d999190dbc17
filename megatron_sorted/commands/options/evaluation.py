"""The options of ``megatron-sorted evaluate``, and what can be said of them before anything slow is loaded."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sorted.commands.parser import Parser, at_least
from megatron_sorted.conversion.hugging_face.families import DTYPES
from megatron_sorted.errors import SettingsError
from megatron_sorted.evaluation.questions import TEMPLATE
from megatron_sorted.evaluation.task_names import check_task_names
from megatron_sorted.settings.derived import MASKS

DEFAULT_SEQ_LENGTH = 2048
KEPT = (
    "dtype",
    "shots",
    "question_template",
    "max_new_tokens",
    "seed",
    "separator",
    "questions",
    "train_heads",
    "task_shots",
    "task_limit",
)
"""Options that evaluation.json keeps."""
DESCRIPTION = """\
Measure every exit of finished models: held-out loss, closed-book questions, lm-evaluation-harness.
Prints tables, writes evaluation.json and .png into --output; docs/evaluation.md defines the numbers."""


def _rate(text: str) -> float:
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def plain(value: Any) -> Any:
    """Return a value of an option as JSON can hold it."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line says.

    Raises:
        SortedError: Nothing is measured, or a task is unknown.
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
        help="Hugging Face directory or checkpoints, or NAME=DIRECTORY",
    )
    group.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="MODEL",
        help="compare with its exits; may be repeated",
    )
    group.add_argument(
        "--depths",
        nargs="+",
        type=int,
        metavar="N",
        help="(default: those of config.json, or all; the last always)",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        metavar="KIND",
        help=f"{', '.join(DTYPES)} (%(default)s)",
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
        help="plain, alpaca, chat or chat:NAME (default: as each was trained)",
    )
    group.add_argument(
        "--output",
        type=Path,
        default=Path("runs/evaluation"),
        metavar="DIR",
        help="folder (%(default)s)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of drawn examples and of the training of heads",
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
        help="cuts plain text into documents (default: a file is one document)",
    )
    text.add_argument(
        "--seq-length",
        type=at_least(1),
        metavar="N",
        help=f"tokens of a window (default: up to {DEFAULT_SEQ_LENGTH})",
    )
    text.add_argument(
        "--stride",
        type=at_least(1),
        metavar="N",
        help="windows start N apart (default: --seq-length)",
    )
    text.add_argument(
        "--append-eos",
        action="store_true",
        help="count the eos at the end of texts and responses too",
    )
    text.add_argument(
        "--limit",
        type=at_least(1),
        metavar="N",
        help="only the first documents or samples of each file",
    )
    text.add_argument(
        "--batch-tokens",
        type=at_least(1),
        default=8192,
        metavar="N",
        help="of one forward pass (%(default)s)",
    )
    data = parser.add_argument_group(
        "prepared data, as a run's own evaluation reads them (masks likewise: --[no-]reset-position-ids, ...)"
    )
    data.add_argument(
        "--data-path",
        nargs="+",
        default=[],
        metavar="PREFIX",
        help="PREFIX.bin and PREFIX.idx of prepared data",
    )
    data.add_argument(
        "--split",
        metavar="SHARES",
        help="as the run's, such as 98,2: its validation share (default: all)",
    )
    for name in MASKS:
        data.add_argument(
            f"--{name.replace('_', '-')}",
            action=argparse.BooleanOptionalAction,
            default=None,
            help=argparse.SUPPRESS,
        )
    asked = parser.add_argument_group("closed-book questions")
    asked.add_argument(
        "--questions",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="JSON lines: question, answer, aliases",
    )
    asked.add_argument(
        "--shots",
        type=at_least(0),
        metavar="N",
        help="examples before each (0 in a trained form, else 5)",
    )
    asked.add_argument(
        "--shots-from",
        type=Path,
        metavar="FILE",
        help="file of the examples (default: the same file)",
    )
    asked.add_argument(
        "--question-template",
        metavar="TEXT",
        help=f"(default, for models of no form: {TEMPLATE!r})",
    )
    asked.add_argument(
        "--num-questions",
        type=at_least(1),
        metavar="N",
        help="only the first questions of each file",
    )
    asked.add_argument(
        "--max-new-tokens",
        type=at_least(1),
        default=32,
        metavar="N",
        help="of an answer (%(default)s)",
    )
    asked.add_argument(
        "--batch-size",
        type=at_least(1),
        default=16,
        metavar="N",
        help="questions or requests at a time (%(default)s)",
    )
    tasks = parser.add_argument_group("lm-evaluation-harness")
    tasks.add_argument(
        "--tasks",
        type=lambda names: [name for name in names.split(",") if name],
        default=[],
        metavar="NAME[,NAME]",
        help="tasks or groups of tasks",
    )
    tasks.add_argument(
        "--tasks-path", type=Path, metavar="DIR", help="folder with the YAML files of local tasks"
    )
    tasks.add_argument(
        "--task-shots", type=at_least(0), metavar="N", help="(default: as the task says)"
    )
    tasks.add_argument(
        "--task-limit", type=at_least(1), metavar="N", help="only the first samples of each task"
    )
    heads = parser.add_argument_group(
        "SFT+ICT: own heads on frozen layers, of the baselines, or of the models if there is no baseline"
    )
    heads.add_argument(
        "--train-heads",
        type=Path,
        metavar="TEXT",
        help="train a norm and a head for each exit on this text",
    )
    heads.add_argument(
        "--train-heads-epochs", type=at_least(1), default=1, metavar="N", help="(%(default)s)"
    )
    heads.add_argument(
        "--train-heads-lr", type=_rate, metavar="LR", help="(default: 1 / hidden size)"
    )
    heads.add_argument(
        "--train-heads-batch-size",
        type=at_least(1),
        default=8,
        metavar="N",
        help="windows of a step (%(default)s)",
    )
    heads.add_argument(
        "--save-heads",
        type=Path,
        metavar="DIR",
        help="write the model with these heads as a nested directory",
    )
    heads.add_argument("--overwrite", action="store_true", help="replace what is at --save-heads")
    values = parser.parse_args(arguments)
    if not (values.text or values.data_path or values.questions or values.tasks):
        raise SettingsError("nothing to measure. Give --text, --data-path, --questions or --tasks.")
    if values.tasks:
        check_task_names(values.tasks, values.tasks_path)
    return values
