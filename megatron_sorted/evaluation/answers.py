"""Scores of an answer: exact match and F1 as TriviaQA defines them, and exact match with case."""

import re
import string
from collections import Counter
from collections.abc import Sequence

PUNCTUATION = frozenset(string.punctuation + "\u2018\u2019\u00b4`")
ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise_answer(text: str) -> str:
    """Normalise an answer: lower case, no punctuation, underscores, articles or extra blanks.

    The definition is that of TriviaQA's official evaluation (M. Joshi et al., ACL 2017, arXiv
    1705.03551; script ``triviaqa_evaluation.py``, function ``normalize_answer``).

    >>> normalise_answer("The Eiffel_Tower!")
    'eiffel tower'
    """
    plain = "".join(" " if sign in PUNCTUATION else sign for sign in text.replace("_", " ").lower())
    return " ".join(ARTICLES.sub(" ", plain).split())


def exact_match(answer: str, right: Sequence[str]) -> bool:
    """Return whether the normalised answer equals one of the right ones, normalised."""
    return normalise_answer(answer) in {normalise_answer(text) for text in right}


def exact_match_with_case(answer: str, right: Sequence[str]) -> bool:
    """Return whether the answer, without blanks around it, equals one of the right ones.

    Sorted LLaMA (arXiv 2309.08968) reports "case sensitive" exact match without details.
    """
    return answer.strip() in {text.strip() for text in right}


def f1(answer: str, right: Sequence[str]) -> float:
    """Return the largest F1 over the right answers, by words after normalisation.

    >>> f1("the blue whale", ["whale", "cat"])
    0.6666666666666666
    """
    return max(
        (_f1(normalise_answer(answer).split(), normalise_answer(text).split()) for text in right),
        default=0.0,
    )


def first_line(generated: str) -> str:
    """Return the answer in generated text: its first line, without blanks around it."""
    return generated.split("\n", 1)[0].strip()


def _f1(answer: list[str], right: list[str]) -> float:
    shared = sum((Counter(answer) & Counter(right)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(answer), shared / len(right)
    return 2 * precision * recall / (precision + recall)
