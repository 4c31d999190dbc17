"""Readers of questions in the format of Spec-Bench, and of prompts."""

from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_lines import read_records
from megatron_sorted.reading.shown import shown
from megatron_sorted.reading.text_file import has_surrogates, read_text, split_lines

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
"""Category of Spec-Bench -> its group (Xia et al., arXiv 2401.07851, section 5).

The eight categories of MT-Bench are conversations.
"""


@dataclass(frozen=True)
class MultiTurnQuestion:
    """A question with one or more turns.

    Attributes:
        id: Identifier in the file.
        category: Category in the file.
        turns: The user's messages.
    """

    id: int | str
    category: str
    turns: tuple[str, ...]

    @property
    def group(self) -> str:
        """Return the group of Spec-Bench; a category that it lacks is a group by itself."""
        return GROUPS.get(self.category, self.category)


def read_questions(path: Path) -> list[MultiTurnQuestion]:
    """Return the questions of a file of JSON lines or records.

    Raises:
        DataError: The file is empty, or an entry is no question.
    """
    questions = []
    for place, entry in read_records(path, REMEDY):
        try:
            questions.append(_question(entry))
        except ValueError as error:
            raise DataError(f"--questions: {place}: {error}. {REMEDY}") from error
    if not questions:
        raise DataError(f"--questions: {shown(path)} is empty. {REMEDY}")
    return questions


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
    if has_surrogates("".join([str(number), str(category), *turns])):
        raise ValueError("a text holds half of a UTF-16 pair")
    return MultiTurnQuestion(number, str(category), tuple(turns))


def spread(items: list, count: int) -> list:
    """Return ``count`` evenly spread items; all if there are fewer.

    >>> spread(list("abcdef"), 3)
    ['a', 'c', 'e']
    """
    if count >= len(items):
        return items
    return [items[index * len(items) // count] for index in range(count)]


def read_prompts(prompt_file: Path | None, questions: Path | None, count: int) -> list[str]:
    """Return evenly spread prompts: lines of a file, or first turns of questions.

    Args:
        prompt_file: File with one prompt per line; used without ``questions``.
        questions: File of questions; None to use ``prompt_file``.
        count: Number of prompts.

    Raises:
        DataError: The file cannot be used.
    """
    if questions is not None:
        return [question.turns[0] for question in spread(read_questions(questions), count)]
    text = read_text(prompt_file, "Give --prompt-file a text in UTF-8, plain or gzipped.")
    lines = [line for line in split_lines(text) if line.strip()]
    if not lines:
        raise DataError(f"--prompt-file: {shown(prompt_file)} is empty. Give one prompt per line.")
    return spread(lines, count)
