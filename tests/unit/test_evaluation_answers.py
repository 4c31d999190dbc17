"""Exact match and F1, with answers worked out by hand from TriviaQA's definition."""

import pytest

from megatron_sorted.evaluation.answers import (
    exact_match,
    exact_match_with_case,
    f1,
    first_line,
    normalise_answer,
)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Beatles", "beatles"),
        ("the_a_an  Onion!", "onion"),
        ("Rock 'n' Roll", "rock n roll"),
        ("A.B.C.", "b c"),
        ("  ", ""),
        ("\u2018Ulysses\u2019", "ulysses"),
        ("Theatre, an area", "theatre area"),
        ("É\u00b4a`x", "é x"),
        ("U.S.A", "u s"),
    ],
)
def test_normalising(text, plain):
    assert normalise_answer(text) == plain


def test_scores():
    right = ("Onion", "Allium cepa", "The Bulb onion")
    assert (
        exact_match("the onion.", right)
        and exact_match("Bulb_Onion", right)
        and not exact_match("onions", right)
    )
    assert exact_match_with_case(" Onion ", right) and not exact_match_with_case("onion", right)
    assert f1("allium", right) == pytest.approx(2 / 3) and f1(
        "a red onion", right
    ) == pytest.approx(2 / 3)
    # one word of two against one of one, and words count as often as they stand there
    assert (
        f1("cepa cepa", ("cepa",)) == pytest.approx(2 / 3)
        and f1("carrot", right) == 0.0
        and f1("", right) == 0.0
    )
    assert first_line(" Onion \nQuestion: next") == "Onion" and first_line("\nOnion") == ""
