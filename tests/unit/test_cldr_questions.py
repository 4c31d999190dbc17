"""Questions about CLDR facts: capacity, no leakage, stable sets, and the three files."""

import json
from pathlib import Path
from string import Formatter

import pytest

from lab.cldr.facts import DEFAULT_LOCALES, Fact, is_unseen
from lab.cldr.phrasings import ENGLISH_CODE, ENGLISH_LINK, ENGLISH_NAME, NAME_IN
from lab.cldr.questions import ASKING_LOCALES, QuestionPlan, ask, phrasings, plan_questions
from lab.make_cldr_questions import main
from megatron_sorted.errors import DataError

LOCALES = ("de", "fi", "fr", "pl", "zh")


@pytest.fixture(scope="module")
def plan() -> QuestionPlan:
    """Return a plan whose questions are all made in about a second."""
    return plan_questions(
        LOCALES,
        ("en", "de", "zh"),
        ("territory", "territory_code", "month", "weekday", "currency_of"),
    )


def question(sample) -> tuple[str, str]:
    """Return what the model is shown."""
    return sample.instruction, sample.input


def test_200k_questions_in_forty_locales_are_there_in_english_alone() -> None:
    plan = plan_questions(
        DEFAULT_LOCALES[:42], ("en",), ("territory", "territory_code", "language", "language_code")
    )
    assert len({fact.locale for fact in plan.trained}) == 42
    assert plan.capacity() >= 200_000


def test_capacity_is_the_number_of_different_questions(plan: QuestionPlan) -> None:
    made = list(plan.train(plan.capacity()))
    assert len({question(sample) for sample in made}) == len(made) == plan.capacity()
    with pytest.raises(DataError, match="--num-samples"):
        plan.train(plan.capacity() + 1)


def test_nothing_held_out_is_trained(plan: QuestionPlan) -> None:
    trained = list(plan.train(plan.capacity()))
    phrasing = plan.phrasing(len(plan.trained), 10**6)
    unseen = plan.never_trained(10**6)
    assert not {question(s) for s in trained} & {question(s) for s in phrasing + unseen}
    assert not {s.fact for s in trained} & {s.fact for s in unseen}
    assert {s.fact for s in phrasing} == {s.fact for s in trained}
    # A name that is unseen in a language is not shown there as part of another question either.
    hidden = {s.output for s in unseen if s.kind == "territory" and s.language == "de"}
    shown = [s for s in trained if s.instruction.startswith(("Wie heißt", "Wie sagt"))]
    assert (
        hidden and shown and not any(f"„{name}“" in s.instruction for s in shown for name in hidden)
    )


def test_every_fact_once_before_any_twice(plan: QuestionPlan) -> None:
    number = len(plan.trained)
    assert [s.fact for s in plan.train(number)] == [str(fact) for fact in plan.trained]
    assert len({s.fact for s in plan.phrasing(number, number)}) == number


def test_splits_do_not_move_with_the_numbers(plan: QuestionPlan) -> None:
    few = plan_questions(
        LOCALES,
        ("en", "de", "zh"),
        ("territory", "territory_code", "month", "weekday", "currency_of"),
        max_facts=50,
    )
    assert few.trained == plan.trained[:50] and few.unseen == plan.unseen
    assert list(few.train(60))[:50] == list(plan.train(50))
    other = plan_questions(LOCALES, ("en",), ("month",), seed=7)
    same = plan_questions(LOCALES, ("en",), ("month",))
    assert set(other.trained) == set(same.trained) and other.trained != same.trained


def test_exact_questions() -> None:
    fact = Fact("territory", "DE", "fr")
    assert ask(fact, "en", ENGLISH_NAME.train[0]).instruction == "What is Germany called in French?"
    assert (
        ask(fact, "de", NAME_IN["de"].train[0]).instruction
        == "Wie heißt „Deutschland“ auf Französisch?"
    )
    assert ask(fact, "zh", NAME_IN["zh"].train[0]).instruction == "“德国”用法语怎么说？"
    sample = ask(fact, "es", NAME_IN["es"].train[3])
    assert (sample.instruction, sample.input, sample.output) == (
        "Da el nombre en francés.",
        "Alemania",
        "Allemagne",
    )
    assert (sample.language, sample.kind, sample.fact) == ("fr", "territory", "territory/DE/fr")
    assert (
        ask(Fact("month_code", "3", "pl"), "en", ENGLISH_CODE.train[0]).instruction
        == "Which month has the number 3? Answer in Polish."
    )
    assert (
        ask(Fact("script", "Arab", "de"), "en", ENGLISH_NAME.train[0]).instruction
        == "What is the Arabic script called in German?"
    )


def test_languages_of_questions_about_a_fact() -> None:
    def languages_of(fact: Fact) -> set[str]:
        return {locale for locale, _ in phrasings(fact, ASKING_LOCALES)}

    assert "fr" not in languages_of(Fact("territory", "DE", "fr")) and {
        "en",
        "de",
        "zh",
    } <= languages_of(Fact("territory", "DE", "fr"))
    assert (
        languages_of(Fact("script", "Cyrl", "de"))
        == languages_of(Fact("territory_code", "DE", "fr"))
        == {"en"}
    )
    # "Tyskland" in all three: copying would answer it
    assert {"sv", "da"}.isdisjoint(languages_of(Fact("territory", "DE", "no")))


def test_enough_phrasings_and_none_on_both_sides() -> None:
    for table in (ENGLISH_NAME, ENGLISH_CODE, *ENGLISH_LINK.values(), *NAME_IN.values()):
        assert len(set(table.train)) >= 4 and 1 <= len(table.held_out) <= 2
        assert not set(table.train) & set(table.held_out)
    for table in NAME_IN.values():
        for template in table.train + table.held_out:
            assert sorted(field for _, field, _, _ in Formatter().parse(template) if field) == [
                "language",
                "thing",
            ]


def test_files_are_the_same_for_the_same_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [
        "--num-samples",
        "300",
        "--num-eval-samples",
        "30",
        "--max-facts",
        "100",
        "--locales",
        "de",
        "fr",
        "--kinds",
        "territory",
        "month",
    ]
    for name in ("one", "two"):
        main(["--output", str(tmp_path / name), *arguments])
    for name, number in (("train", 300), ("phrasing", 30), ("unseen", 30)):
        lines = (tmp_path / "one" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert (
            lines == (tmp_path / "two" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        )
        assert len(lines) == number
        assert list(json.loads(lines[0])) == [
            "instruction",
            "input",
            "output",
            "language",
            "kind",
            "fact",
        ]
    unseen = [
        json.loads(line)["fact"].split("/")
        for line in (tmp_path / "one/unseen.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert all(is_unseen(Fact(*parts)) for parts in unseen)
    assert (
        "train.jsonl                    300         100           2           2"
        in capsys.readouterr().out
    )


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--asking-locales: no questions are written in 'sq'"):
        plan_questions(LOCALES, ("sq",))
    with pytest.raises(DataError, match="--max-facts: 0 is not positive"):
        main(["--output", str(tmp_path), "--max-facts", "0"])
