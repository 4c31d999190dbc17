"""Closed-book questions: their files, and prompts with worked examples."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.errors import DataError, SettingsError
from megatron_sorted.reading.json_lines import read_records
from megatron_sorted.reading.shown import shown
from megatron_sorted.reading.text_file import has_surrogates

TEMPLATE = "Question: {question}\nAnswer:"
_WRITTEN_OUT = re.compile(r"Question:\s*(.*?)\s*\nAnswer:\s*", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """A question with its right answers.

    Attributes:
        text: The question itself.
        answer: Answer to show in a worked example.
        right: All right answers, ``answer`` among them.
    """

    text: str
    answer: str
    right: tuple[str, ...]


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a file of JSON lines or records.

    A record has ``question`` (or ``context`` = "Question: ...\\nAnswer:", or ``instruction`` and
    perhaps ``input``) and ``answer`` (or ``output``): a text, a list of texts, or an object with
    ``value`` and ``aliases`` as in TriviaQA's own files; the record may have ``aliases`` too.

    Raises:
        DataError: The file is missing or empty, or a record has no question or no answer.
    """
    questions = []
    for place, record in read_records(path):
        try:
            if not isinstance(record, dict):
                raise ValueError("not an object")
            questions.append(_question(record))
        except ValueError as error:
            raise DataError(f"{place}: {error}. Correct or remove the line.") from error
    if not questions:
        raise DataError(
            f"{shown(path)}: no question in it. Give JSON lines with 'question' and 'answer'."
        )
    return questions


def check_template(template: str) -> str:
    """Check that the template holds {question}, and return it.

    Raises:
        SettingsError: It does not.
    """
    if "{question}" not in template:
        raise SettingsError(
            f"--question-template: {template!r} has no {{question}}. Write {{question}} where the "
            "question belongs."
        )
    return template


def choose_examples(
    questions: Sequence[Question],
    shots: int,
    examples: Sequence[Question] | None = None,
    seed: int = 0,
) -> list[list[Question]]:
    """Draw ``shots`` worked examples for each question.

    They are drawn for each question separately, from ``examples`` or from the other questions, and
    never have the question's own text. They do not depend on the questions before.

    Raises:
        DataError: There are fewer examples than shots.
    """
    pool = list(questions if examples is None else examples)
    # more than needed are drawn, so that a question's own text can be skipped
    count = min(len(pool), 4 * shots + 8)
    chosen = []
    for number, question in enumerate(questions):
        drawn = random.Random(f"{seed}/{number}").sample(pool, count) if shots else []
        others = [example for example in drawn if example.text != question.text][:shots]
        if len(others) < shots:
            raise DataError(
                f"--shots: {shots} examples are needed, but there are {len(others)} other "
                "questions. Use fewer --shots or give --shots-from FILE."
            )
        chosen.append(others)
    return chosen


def write_prompts(
    questions: Sequence[Question],
    shots: int,
    examples: Sequence[Question] | None = None,
    template: str = TEMPLATE,
    seed: int = 0,
) -> list[str]:
    """Return a prompt for each question: worked examples, then the question without its answer.

    Raises:
        DataError: There are fewer examples than shots.
    """
    prompts = []
    for question, some in zip(
        questions, choose_examples(questions, shots, examples, seed), strict=True
    ):
        shown_examples = [_worked_example(example, template) for example in some]
        prompts.append(
            "\n\n".join([*shown_examples, template.replace("{question}", question.text)])
        )
    return prompts


def as_conversation(question: Question, examples: Sequence[Question]) -> list[dict[str, str]]:
    """Return a conversation with the examples as earlier turns and the question as the last one."""
    turns = []
    for example in examples:
        turns.append({"role": "user", "content": example.text})
        turns.append({"role": "assistant", "content": example.answer})
    return [*turns, {"role": "user", "content": question.text}]


def _worked_example(example: Question, template: str) -> str:
    prompt = template.replace("{question}", example.text)
    return prompt + example.answer if prompt[-1:].isspace() else f"{prompt} {example.answer}"


def _question(record: dict[str, Any]) -> Question:
    # a null stands for a missing field in a union of data sets
    record = {name: value for name, value in record.items() if value is not None}
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
        aliases = _texts(answer.get("aliases"), "aliases")
        more = [*aliases, *_texts(by_people, "human_answers"), *more]
        answer = answer.get("value")
    if isinstance(answer, list) and (answers := _texts(answer, "answer")):
        more, answer = [*answers, *more], answers[0]
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError("no answer (field 'answer' or 'output')")
    if has_surrogates("".join([text, answer, *more])):
        raise ValueError("invalid_unicode")
    return Question(text.strip(), answer.strip(), tuple(dict.fromkeys([answer, *more])))


def _texts(value: Any, name: str) -> list[str]:
    """Return the texts of a list without nulls; [] for null."""
    value = [] if value is None else value
    texts = [one for one in value if one is not None] if isinstance(value, list) else None
    if texts is None or not all(isinstance(one, str) for one in texts):
        raise ValueError(f"'{name}' is not a list of texts")
    return texts
