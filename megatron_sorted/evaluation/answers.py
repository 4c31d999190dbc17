"""Whether an answer is right: exact match and F1 as TriviaQA defines them, and exact match with case."""

import re
import string
from collections import Counter
from collections.abc import Sequence

PUNCTUATION = frozenset(string.punctuation + "\u2018\u2019\u00b4`")
ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise_answer(text: str) -> str:
    """Return an answer in lower case, underscores and punctuation turned into blanks, without articles and spare blanks.

    The definition of TriviaQA's official evaluation (M. Joshi et al., ACL 2017, arXiv 1705.03551; script ``triviaqa_evaluation.py``,
    function ``normalize_answer``), written anew from it.
    """
    plain = "".join(" " if sign in PUNCTUATION else sign for sign in text.replace("_", " ").lower())
    return " ".join(ARTICLES.sub(" ", plain).split())


def exact_match(answer: str, right: Sequence[str]) -> bool:
    """Return whether the normalised answer equals one of the right ones, normalised."""
    return normalise_answer(answer) in {normalise_answer(text) for text in right}


def exact_match_with_case(answer: str, right: Sequence[str]) -> bool:
    """Return whether the answer, blanks around it apart, is letter by letter one of the right ones.

    Sorted LLaMA (arXiv 2309.08968) reports exact match on TriviaQA "case sensitive", without saying more.
    """
    return answer.strip() in {text.strip() for text in right}


def f1(answer: str, right: Sequence[str]) -> float:
    """Return the largest F1 over the right answers, of the words that answer and right answer share after normalising."""
    return max(
        (_f1(normalise_answer(answer).split(), normalise_answer(text).split()) for text in right),
        default=0.0,
    )


def first_line(generated: str) -> str:
    """Return the answer in generated text: what stands before the first line break, blanks around it dropped."""
    return generated.split("\n", 1)[0].strip()


def _f1(words: list[str], right: list[str]) -> float:
    shared = sum((Counter(words) & Counter(right)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(words), shared / len(right)
    return 2 * precision * recall / (precision + recall)
