"""Closed-book questions: reading them, and prompts with worked examples."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.command_line import has_half_pairs
from megatron_sorted.errors import DataError, SettingsError
from megatron_sorted.reading.json_lines import read_records
from megatron_sorted.reading.shown import shown

TEMPLATE = "Question: {question}\nAnswer:"
_WRITTEN_OUT = re.compile(r"Question:\s*(.*?)\s*\nAnswer:\s*", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        text: The question alone.
        answer: As an example shows it.
        right: Every answer that counts as right, ``answer`` among them.
    """

    text: str
    answer: str
    right: tuple[str, ...]


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a file of JSON lines or records.

    A line has ``question`` (or ``context`` = "Question: ...\\nAnswer:", or ``instruction`` and perhaps ``input``) and ``answer`` (or
    ``output``): a text, a list of texts, or an object with ``value`` and ``aliases`` as in TriviaQA's own files; ``aliases`` may stand
    beside it.

    Raises:
        DataError: No such file, nothing in it, or a line without question or answer.
    """
    questions = []
    for place, record in read_records(path):
        try:
            if not isinstance(record, dict):
                raise ValueError("not an object")
            questions.append(_question(record))
        except ValueError as error:
            raise DataError(f"{place}: {error}. Mend or remove the line.") from error
    if not questions:
        raise DataError(
            f"{shown(path)}: no question in it. Give JSON lines with 'question' and 'answer'."
        )
    return questions


def check_template(template: str) -> str:
    """Return the template.

    Raises:
        SettingsError: It does not say where the question stands.
    """
    if "{question}" not in template:
        raise SettingsError(
            f"--question-template: {template!r} has no {{question}}. Write {{question}} where the question belongs."
        )
    return template


def choose_examples(
    questions: Sequence[Question],
    shots: int,
    examples: Sequence[Question] | None = None,
    seed: int = 0,
) -> list[list[Question]]:
    """Return ``shots`` worked examples for each question.

    Examples are drawn anew for each question, from ``examples`` or from the other questions; never one with the same text. They do not
    depend on which other questions are asked before.

    Raises:
        DataError: There are fewer examples than shots.
    """
    pool = list(questions if examples is None else examples)
    found = []
    for place, question in enumerate(questions):
        # a few more than needed are drawn, so that a question's own text can be passed over
        drawn = (
            random.Random(f"{seed}/{place}").sample(
                pool, len(pool) if len(pool) <= 4 * shots + 8 else 4 * shots + 8
            )
            if shots
            else []
        )
        chosen = [example for example in drawn if example.text != question.text][:shots]
        if len(chosen) < shots:
            raise DataError(
                f"--shots: {shots} examples are wanted, {len(chosen)} other questions are there. Use fewer --shots or "
                "give --shots-from FILE."
            )
        found.append(chosen)
    return found


def write_prompts(
    questions: Sequence[Question],
    shots: int,
    examples: Sequence[Question] | None = None,
    template: str = TEMPLATE,
    seed: int = 0,
) -> list[str]:
    """Return a prompt for each question: ``shots`` worked examples, then the question without its answer.

    Raises:
        DataError: There are fewer examples than shots.
    """
    chosen = choose_examples(questions, shots, examples, seed)
    return [
        "\n\n".join(
            [
                *(_join(_ask(example.text, template), example.answer) for example in some),
                _ask(question.text, template),
            ]
        )
        for question, some in zip(questions, chosen, strict=True)
    ]


def as_conversation(question: Question, examples: Sequence[Question]) -> list[dict[str, str]]:
    """Return a question behind its examples, each a turn of its own."""
    turns = [
        turn
        for example in examples
        for turn in (
            {"role": "user", "content": example.text},
            {"role": "assistant", "content": example.answer},
        )
    ]
    return [*turns, {"role": "user", "content": question.text}]


def _ask(text: str, template: str) -> str:
    return template.replace("{question}", text)


def _join(prompt: str, answer: str) -> str:
    return prompt + answer if prompt[-1:].isspace() else f"{prompt} {answer}"


def _question(record: dict[str, Any]) -> Question:
    record = {
        name: value for name, value in record.items() if value is not None
    }  # as writers of a union of data sets leave them
    text = record.get("question", record.get("context"))
    if text is None and isinstance(record.get("instruction"), str):
        given = record.get("input") or ""
        text = f"{record['instruction']}\n{given}" if given else record["instruction"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError("no question (field 'question', 'context' or 'instruction')")
    if "question" not in record and (written := _WRITTEN_OUT.fullmatch(text)):
        text = written.group(1)
    answer = record.get("answer", record.get("output"))
    more = _texts(record.get("aliases"), "aliases")
    if isinstance(answer, dict):
        by_people = answer.get("human_answers") or answer.get("HumanAnswers")
        more = [
            *_texts(answer.get("aliases"), "aliases"),
            *_texts(by_people, "human_answers"),
            *more,
        ]
        answer = answer.get("value")
    if isinstance(answer, list) and (said := _texts(answer, "answer")):
        more, answer = [*said, *more], said[0]
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError("no answer (field 'answer' or 'output')")
    if has_half_pairs("".join([text, answer, *more])):
        raise ValueError("invalid_unicode")
    return Question(text.strip(), answer.strip(), tuple(dict.fromkeys([answer, *more])))


def _texts(value: Any, name: str) -> list[str]:
    """Return a list of texts without those that are null; of null an empty one."""
    value = [] if value is None else value
    found = [one for one in value if one is not None] if isinstance(value, list) else None
    if found is None or not all(isinstance(one, str) for one in found):
        raise ValueError(f"'{name}' is not a list of texts")
    return found
