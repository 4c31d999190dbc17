"""Groups of questions: Spec-Bench's, MT-Bench's categories as conversations, and a user's own."""

import gzip
import json

import pytest

from megatron_sorted.benchmark.questions import (
    CONVERSATION,
    MultiTurnQuestion,
    read_prompts,
    read_questions,
)
from megatron_sorted.errors import DataError


def test_groups_of_categories():
    groups = {
        name: MultiTurnQuestion(1, name, ("a",)).group
        for name in ("writing", "stem", "qa", "cooking", CONVERSATION)
    }
    assert groups == {
        "writing": CONVERSATION,
        "stem": CONVERSATION,
        "qa": "question answering",
        "cooking": "cooking",
        CONVERSATION: CONVERSATION,
    }


GOOD = {"question_id": 81, "category": "writing", "turns": ["a\u2028b", "c"], "reference": None}


@pytest.mark.parametrize(
    "write",
    [
        lambda rows: "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        lambda rows: json.dumps(rows, indent=1),
    ],
)
def test_lines_and_lists_are_read_alike(tmp_path, write):
    (tmp_path / "q").write_text(
        write([GOOD, GOOD | {"question_id": "x"}]), encoding="utf-8", newline=""
    )
    assert read_questions(tmp_path / "q") == [
        MultiTurnQuestion(81, "writing", ("a\u2028b", "c")),
        MultiTurnQuestion("x", "writing", ("a\u2028b", "c")),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category": None}, "no category"),
        ({"turns": None}, "no turns"),
        ({"question_id": None}, "no question_id"),
        ({"turns": [1]}, "not a list"),
        ({"turns": "ab"}, "not a list of texts"),
        ({"turns": []}, "not a list"),
        ({"turns": ["\ud800"]}, "UTF-16"),
        ({"category": ["a"]}, "neither texts nor numbers"),
    ],
)
def test_what_is_no_question_is_named_with_its_line(tmp_path, change, message):
    (tmp_path / "q").write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD | change)}\n")
    with pytest.raises(
        DataError, match=rf"--questions: .*q:3: .*{message}.* Give JSON lines with question_id"
    ):
        read_questions(tmp_path / "q")


def test_prompts_end_at_line_feeds(tmp_path):
    (tmp_path / "p.gz").write_bytes(gzip.compress("\ufeffa\u2028b\r\n \nc\x0c\rd".encode()))
    assert read_prompts(tmp_path / "p.gz", None, 9) == ["a\u2028b", "c\x0c\rd"]
