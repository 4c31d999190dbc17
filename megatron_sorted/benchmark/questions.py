"""Questions in Spec-Bench's form, and prompts of a file."""

from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.command_line import has_half_pairs
from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_lines import read_records
from megatron_sorted.reading.shown import shown
from megatron_sorted.reading.text_file import read_text, split_lines

REMEDY = "Give JSON lines with question_id, category and turns."

CONVERSATION = "multi-turn conversation"
MT_BENCH = (
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
)
GROUPS = {
    "translation": "translation",
    "summarization": "summarization",
    "qa": "question answering",
    "math_reasoning": "mathematical reasoning",
    "rag": "retrieval-augmented generation",
}
GROUPS = dict.fromkeys(MT_BENCH, CONVERSATION) | GROUPS
"""Spec-Bench's category -> its group; MT-Bench's eight categories are conversations (Xia et al., arXiv 2401.07851, section 5)."""


@dataclass(frozen=True)
class MultiTurnQuestion:
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


def read_questions(path: Path) -> list[MultiTurnQuestion]:
    """Return the questions of a file of JSON lines or records.

    Raises:
        DataError: One is none.
    """
    found = []
    for place, entry in read_records(path, REMEDY):
        try:
            found.append(_question(entry))
        except ValueError as error:
            raise DataError(f"--questions: {place}: {error}. {REMEDY}") from error
    if not found:
        raise DataError(f"--questions: {shown(path)} is empty. {REMEDY}")
    return found


def _question(entry: object) -> MultiTurnQuestion:
    if not isinstance(entry, dict):
        raise ValueError("not an object")
    for name in ("question_id", "category", "turns"):
        if entry.get(name) is None:
            raise ValueError(f"no {name}")
    number, category, turns = entry["question_id"], entry["category"], entry["turns"]
    if not isinstance(number, int | str) or not isinstance(category, int | str):
        raise ValueError("question_id and category are neither texts nor numbers")
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(turn, str) and turn for turn in turns)
    ):
        raise ValueError("turns is not a list of texts")
    if has_half_pairs("".join([str(number), str(category), *turns])):
        raise ValueError("half of a UTF-16 pair is no text")
    return MultiTurnQuestion(number, str(category), tuple(turns))


def spread(items: list, count: int) -> list:
    """Return ``count`` of the items, evenly spread; all if there are no more."""
    return (
        items
        if count >= len(items)
        else [items[index * len(items) // count] for index in range(count)]
    )


def read_prompts(prompt_file: Path | None, questions: Path | None, count: int) -> list[str]:
    """Return some texts of a file of prompts, or the first turns of some questions, evenly spread.

    Raises:
        DataError: The file cannot be used.
    """
    if questions is not None:
        return [question.turns[0] for question in spread(read_questions(questions), count)]
    text = read_text(prompt_file, "Give --prompt-file a text in UTF-8, plain or gzipped.")
    lines = [line for line in split_lines(text) if line.strip()]
    if not lines:
        raise DataError(f"--prompt-file: {shown(prompt_file)} is empty. Give texts, one a line.")
    return spread(lines, count)
