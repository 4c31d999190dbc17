"""Facts from CLDR: known answers, what is left out, and the split that no seed or count moves."""

import pytest

from lab.cldr.facts import (
    DEFAULT_LOCALES,
    NAME_KINDS,
    Fact,
    all_facts,
    answer,
    is_unseen,
    links,
    own_names,
    stable_hash,
)
from lab.cldr.questions import ASKING_LOCALES
from megatron_sorted.errors import DataError


@pytest.mark.parametrize(
    ("kind", "code", "locale", "expected"),
    [
        ("territory", "DE", "fr", "Allemagne"),
        ("territory", "DE", "fi", "Saksa"),
        ("territory", "JP", "zh", "日本"),
        ("territory_code", "CH", "it", "Svizzera"),
        ("language", "pl", "de", "Polnisch"),
        ("language_code", "pl", "en", "Polish"),
        ("script", "Cyrl", "es", "cirílico"),
        ("currency", "GBP", "de", "Britisches Pfund"),
        ("month", "3", "pl", "marzec"),
        ("month", "3", "ru", "март"),  # the name by itself, not "марта" as in a date
        ("weekday", "1", "de", "Montag"),
        ("weekday", "7", "ru", "воскресенье"),
        ("currency_of", "CH", "fr", "franc suisse"),
        ("language_of", "BR", "es", "portugués"),
    ],
)
def test_known_answers(kind: str, code: str, locale: str, expected: str) -> None:
    assert answer(Fact(kind, code, locale)) == expected


@pytest.mark.parametrize(
    ("kind", "code", "locale"),
    [
        ("territory", "DE", "pt_PT"),  # European Portuguese takes "Alemanha" over from its parent
        ("territory", "ZZ", "fr"),  # "région indéterminée" is no territory
        ("territory", "OM", "de"),  # "Oman", as in English
        ("territory", "DE", "en"),  # the question itself would say it
        ("month", "3", "ja"),  # "3月" repeats the number
        ("currency_of", "PA", "fr"),  # two currencies
        ("language_of", "CH", "fr"),  # several languages
    ],
)
def test_left_out(kind: str, code: str, locale: str) -> None:
    assert answer(Fact(kind, code, locale)) is None


def test_names_of_a_kind_differ_so_a_name_can_stand_for_its_thing() -> None:
    for locale in ASKING_LOCALES:
        for kind in NAME_KINDS:
            names = [name.casefold() for name in own_names(kind, locale).values()]
            assert len(set(names)) == len(names), (kind, locale)


def test_links_are_single() -> None:
    assert links("currency_of")["FR"] == "EUR" and links("language_of")["PL"] == "pl"
    assert "CH" not in links("language_of")


def test_no_invisible_characters_around_names() -> None:
    assert (
        own_names("currency", "lo")["DJF"][0] == "ດ"
    )  # CLDR's entry begins with a space of no width


def test_hash_is_the_same_everywhere() -> None:
    # blake2b over "a" 0x1f "1", 8 bytes, big-endian; a salted hash would differ in every process
    assert stable_hash("a", 1) == int.from_bytes(
        __import__("hashlib").blake2b(b"a\x1f1", digest_size=8).digest(), "big"
    )


def test_unseen_is_one_in_ten_and_shared_by_what_would_give_it_away() -> None:
    facts = all_facts(("de", "fr", "pl", "zh"), ("territory", "language"))
    share = sum(is_unseen(fact) for fact in facts) / len(facts)
    assert 0.08 < share < 0.12
    assert all(
        is_unseen(fact) == is_unseen(Fact(f"{fact.kind}_code", fact.code, fact.locale))
        for fact in facts
    )
    assert not any(
        is_unseen(Fact("territory_code", code, "en")) for code in own_names("territory", "en")
    )
    assert all(
        is_unseen(Fact("currency_of", code, "de")) == is_unseen(Fact("currency_of", code, "zh"))
        for code in links("currency_of")
    )


def test_at_least_forty_locales_by_default_each_with_names() -> None:
    assert len(set(DEFAULT_LOCALES)) == len(DEFAULT_LOCALES) >= 40
    assert all(len(own_names("territory", locale)) > 200 for locale in DEFAULT_LOCALES)


@pytest.mark.parametrize(
    ("locales", "kinds", "message"),
    [
        (("xx",), ("month",), "--locales: 'xx' is not a CLDR locale"),
        (("ccp", "de", "en_ZW"), ("month",), "--locales: English has no name"),
        (("de",), ("capital",), "--kinds: 'capital' is no kind"),
    ],
)
def test_mistakes(locales: tuple[str, ...], kinds: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        all_facts(locales, kinds)
