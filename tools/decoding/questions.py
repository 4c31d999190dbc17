"""Questions in Spec-Bench's form, and prompts of a file."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.decoding.writer import Writer
from megatron_sorted.errors import DataError, SettingsError

CONVERSATION = "multi-turn conversation"
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
GROUPS = {"translation": "translation", "summarization": "summarization", "qa": "question answering",
          "math_reasoning": "mathematical reasoning", "rag": "retrieval-augmented generation"}
GROUPS = dict.fromkeys(MT_BENCH, CONVERSATION) | GROUPS
"""Spec-Bench's category -> its group; MT-Bench's eight categories are conversations (Xia et al., arXiv 2401.07851, section 5)."""


@dataclass(frozen=True)
class Question:
    """One conversation to hold.

    Attributes:
        id: As the file says.
        category: As the file says.
        turns: What the user says, one after another.
    """

    id: int | str
    category: str
    turns: tuple[str, ...]

    @property
    def group(self) -> str:
        """Return Spec-Bench's group; a category that is none of its own is a group of that name."""
        return GROUPS.get(self.category, self.category)


def read_questions(path: Path) -> list[Question]:
    """Returns the questions of a file of JSON lines.

    Raises:
        DataError: A line is none.
    """
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--questions: {path}: {error}. Give JSON lines with question_id, category and turns.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            turns = tuple(entry["turns"])
            if not turns or not all(isinstance(turn, str) and turn for turn in turns):
                raise ValueError("turns is not a list of texts")
            found.append(Question(entry["question_id"], str(entry["category"]), turns))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"--questions: {path}, line {number}: {error!r}. Give question_id, category and turns.") from error
    if not found:
        raise DataError(f"--questions: {path} is empty. Give JSON lines with question_id, category and turns.")
    return found


def spread(items: list, count: int) -> list:
    """Returns ``count`` of the items, evenly spread; all if there are no more."""
    return items if count >= len(items) else [items[index * len(items) // count] for index in range(count)]


def add_prompt_options(parser: argparse.ArgumentParser, count: int) -> None:
    """Adds what `read_prompts` reads, and how many of them by default."""
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="texts to go on with, one a line")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="Spec-Bench's form: JSON lines with question_id, category, turns")
    parser.add_argument("--num-prompts", type=int, default=count, help="that are used, evenly spread over the file (%(default)s)")


def read_prompts(values: argparse.Namespace, writer: Writer) -> list[list[int]]:
    """Returns the tokens of some prompts of --prompt-file or --questions, cut at the front so that what is written fits.

    Raises:
        SettingsError: Both or none are given.
        DataError: A file cannot be used.
    """
    if (values.prompt_file is None) == (values.questions is None):
        raise SettingsError("Give --prompt-file or --questions, one of them: texts like those that will be written.")
    if values.questions is not None:
        asked = spread(read_questions(values.questions), values.num_prompts)
        ids = [writer.encode_chat([{"role": "user", "content": question.turns[0]}]) for question in asked]
    else:
        try:
            lines = [line for line in values.prompt_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--prompt-file: {values.prompt_file}: {error}. Give a text file.") from error
        if not lines:
            raise DataError(f"--prompt-file: {values.prompt_file} is empty. Give texts, one a line.")
        ids = [writer.encode(line) for line in spread(lines, values.num_prompts)]
    room = writer.network.max_positions - values.max_new_tokens
    if room < 1:
        raise SettingsError(f"--max-new-tokens: {values.max_new_tokens} fill the context of {writer.network.max_positions}. Ask for fewer.")
    return [prompt[-room:] for prompt in ids]
