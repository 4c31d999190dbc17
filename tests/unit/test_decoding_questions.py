"""Categories of questions: Spec-Bench's groups, MT-Bench's eight as conversations, and a user's own as they are."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from decoding.questions import CONVERSATION, Question


def test_groups_of_categories():
    groups = {name: Question(1, name, ("a",)).group for name in ("writing", "stem", "qa", "cooking", CONVERSATION)}
    assert groups == {"writing": CONVERSATION, "stem": CONVERSATION, "qa": "question answering", "cooking": "cooking",
                      CONVERSATION: CONVERSATION}
