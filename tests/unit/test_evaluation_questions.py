"""Questions in files, and prompts."""

import json

import pytest

from megatron_sorted.errors import DataError, SettingsError
from megatron_sorted.evaluation.questions import (
    Question,
    check_template,
    read_questions,
    write_prompts,
)


def lines(path, *records):
    path.write_text(
        "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records),
        encoding="utf-8",
    )
    return path


def test_all_spellings_of_a_question(tmp_path):
    questions = read_questions(
        lines(
            tmp_path / "q.jsonl",
            {"question": "Who?", "answer": "Ada", "aliases": ["Ada L.", "Ada"]},
            {"context": "Question: Where?\nAnswer:", "answer": "Here"},
            {"context": "Say where:", "answer": ["Here", "There"]},
            {
                "question": "When?",
                "answer": {"value": "Now", "aliases": ["Today"], "human_answers": ["this day"]},
            },
            {"instruction": "Translate.", "input": "cat", "output": "猫"},
        )
    )
    assert questions == [
        Question("Who?", "Ada", ("Ada", "Ada L.")),
        Question("Where?", "Here", ("Here",)),
        Question("Say where:", "Here", ("Here", "There")),
        Question("When?", "Now", ("Now", "Today", "this day")),
        Question("Translate.\ncat", "猫", ("猫",)),
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"answer": "x"}, "no question"),
        ({"question": " ", "answer": "x"}, "no question"),
        ({"question": "q"}, "no answer"),
        ({"question": "q", "answer": "x", "aliases": "y"}, "'aliases' is not a list"),
        ([1], "not an object"),
        ({"question": 3}, "no question"),
        ("{", "not_json"),
    ],
)
def test_the_line_of_a_bad_question_is_named(tmp_path, record, reason):
    path = lines(tmp_path / "q.jsonl", {"question": "a", "answer": "b"}, "", record)
    with pytest.raises(DataError, match=rf"q\.jsonl:3: {reason}"):
        read_questions(path)


def test_no_questions(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(DataError, match=r"no question in it"):
        read_questions(lines(tmp_path / "q.jsonl", ""))
    with pytest.raises(SettingsError, match=r"has no \{question\}"):
        check_template("Q:")


def test_prompts():
    questions = [Question(f"q{i}", f"a{i}", (f"a{i}",)) for i in range(4)]
    assert write_prompts(questions[:1], 0, questions) == ["Question: q0\nAnswer:"]
    only = [Question("q9", "a9", ("a9",))]
    assert write_prompts(questions[:1], 1, only, "{question}\n") == ["q9\na9\n\nq0\n"]
    assert write_prompts(questions[:1], 1, only) == [
        "Question: q9\nAnswer: a9\n\nQuestion: q0\nAnswer:"
    ]
    prompts = write_prompts(questions, 3)
    for i, prompt in enumerate(prompts):
        *examples, last = prompt.split("\n\n")
        assert last == f"Question: q{i}\nAnswer:"
        assert sorted(examples) == [
            f"Question: q{j}\nAnswer: a{j}" for j in range(4) if j != i
        ]  # never the question itself
    many = [Question(f"q{i}", f"a{i}", ()) for i in range(100)]
    assert write_prompts(many, 2)[:5] == write_prompts(
        many[:5], 2, many
    )  # a limit changes no prompt
    assert write_prompts(many, 2, seed=1) != write_prompts(many, 2)
    with pytest.raises(DataError, match="4 examples are needed, but there are 3 other questions"):
        write_prompts(questions, 4)


def test_a_null_field_is_a_missing_field(tmp_path):
    path = lines(
        tmp_path / "q.jsonl",
        {"question": None, "context": "Question: A?\nAnswer:", "answer": None, "output": "a"},
        {"question": "B?", "answer": [None, "b", None, "c"], "aliases": None},
        {
            "question": "C?",
            "answer": {"value": "c", "aliases": None, "human_answers": ["d", None]},
            "aliases": [None, "e"],
        },
    )
    assert [(one.text, one.answer, one.right) for one in read_questions(path)] == [
        ("A?", "a", ("a",)),
        ("B?", "b", ("b", "c")),
        ("C?", "c", ("c", "d", "e")),
    ]


@pytest.mark.parametrize("aliases", ["y", 5, {"a": 1}, [1], [["a"]]])
@pytest.mark.parametrize("answer", ["x", ["x"], {"value": "x"}])
def test_aliases_of_another_kind_are_refused(tmp_path, answer, aliases):
    with pytest.raises(DataError, match=r"q\.jsonl:1: 'aliases' is not a list of texts"):
        read_questions(
            lines(tmp_path / "q.jsonl", {"question": "q", "answer": answer, "aliases": aliases})
        )
