"""True facts in many languages from Unicode CLDR, which Babel contains.

A fact is the name of one thing (a territory, a language, a month, ...) in one locale. Nothing is
downloaded, and nothing here imports torch.
"""

import re
from dataclasses import dataclass
from datetime import date
from functools import cache
from hashlib import blake2b

from babel import localedata
from babel.languages import get_official_languages
from babel.numbers import get_territory_currencies

from megatron_sorted.errors import DataError

NAME_KINDS = ("territory", "language", "script", "currency", "month", "weekday")
CODE_KINDS = tuple(f"{kind}_code" for kind in NAME_KINDS)
"""The same names; their questions give a code instead of the English name."""
LINK_KINDS = ("currency_of", "language_of")
"""One step further: territory -> its currency or language."""
KINDS = NAME_KINDS + CODE_KINDS + LINK_KINDS

_EUROPE = (
    "en de fr es it pt nl sv da no fi pl cs sk hu ro hr sl sr bg mk ru uk lt lv et el ca gl eu cy"
    " ga is sq"
)
_ELSEWHERE = (
    "tr az ka hy he ar fa hi bn mr ta te kn ml gu ne th lo my km vi id ms ja ko zh kk mn af sw zu"
    " am"
)
DEFAULT_LOCALES = (*_EUROPE.split(), *_ELSEWHERE.split())

# Placeholders such as "unknown region", test codes and groups of states are no real names.
_EXCLUDED = {
    "territory": {"ZZ", "XA", "XB", "QO", "EU", "EZ", "UN"},
    "language": {"und", "mul", "zxx", "mis", "root"},
    "script": {"Qaag", "Zanb", "Zinh", "Zmth", "Zsye", "Zsym", "Zxxx", "Zyyy", "Zzzz"},
    "currency": {
        *("XAG", "XAU", "XBA", "XBB", "XBC", "XBD", "XDR", "XEU", "XFO", "XFU", "XPD", "XPT"),
        *("XRE", "XSU", "XTS", "XUA", "XXX"),
    },
}
_CLDR_FIELD = {
    "territory": "territories",
    "language": "languages",
    "script": "scripts",
    "currency": "currency_names",
}
_LINK_DATE = date(2024, 1, 1)
"""A fixed date, so that the questions do not depend on the day they are made."""
_INVISIBLE = "^[\u200b\u200e\u200f]+|[\u200b\u200e\u200f]+$|\u00ad"
"""Space of no width, direction marks, soft hyphen."""
_UNSEEN_OF_1000 = 100


@dataclass(frozen=True)
class Fact:
    """One thing's name in one locale.

    >>> answer(Fact("territory", "DE", "fr"))
    'Allemagne'
    """

    kind: str
    code: str
    locale: str

    def __str__(self) -> str:
        """Return the fact's name in files: ``territory/DE/fr``."""
        return f"{self.kind}/{self.code}/{self.locale}"


def stable_hash(*parts: object) -> int:
    """Return a 64-bit number that is the same in every process and on every machine."""
    return int.from_bytes(
        blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest(), "big"
    )


@cache
def own_names(kind: str, locale: str) -> dict[str, str]:
    """Return {code: name} of the names that the locale itself defines.

    Names inherited from a parent locale and names equal to their code are absent.

    Raises:
        DataError: Babel has no such locale.
    """
    if not localedata.exists(locale):
        raise DataError(
            f"--locales: {locale!r} is not a CLDR locale known to Babel."
            " Use names such as de, fr, zh or pt_PT."
        )
    data = localedata.load(locale, merge_inherited=False)
    if kind in ("month", "weekday"):
        widths = data.get("months" if kind == "month" else "days", {})
        # "stand-alone" is the name by itself (Russian "март"), "format" its form in a date
        # ("марта").
        numbered = next(
            (
                widths[form]["wide"]
                for form in ("stand-alone", "format")
                if isinstance(widths.get(form, {}).get("wide"), dict)
            ),
            {},
        )
        names = {
            str(number if kind == "month" else number + 1): name
            for number, name in numbered.items()
        }
    else:
        names = {
            code: name
            for code, name in data.get(_CLDR_FIELD[kind], {}).items()
            if isinstance(name, str)
        }
    names = {code: re.sub(_INVISIBLE, "", name).strip() for code, name in names.items()}
    return {code: name for code, name in names.items() if _is_a_name(kind, code, name)}


def _is_a_name(kind: str, code: str, name: str) -> bool:
    """Return whether the entry is a plain name of a real thing, without remarks or years."""
    if kind == "territory" and not re.fullmatch("[A-Z]{2}", code):
        return False
    if code in _EXCLUDED.get(kind, ()):
        return False
    return len(name) > 1 and name != code and not re.search(r"[()\[\]（）\d|\n]|[∅↑]", name)


@cache
def links(kind: str) -> dict[str, str]:
    """Return {territory: its currency or official language}; those with several are absent."""
    only = {}
    for territory in own_names("territory", "en"):
        linked = (
            get_territory_currencies(territory, start_date=_LINK_DATE, end_date=_LINK_DATE)
            if kind == "currency_of"
            else get_official_languages(territory, de_facto=True)
        )
        if len(linked) == 1:
            only[territory] = linked[0]
    return only


def base_kind(kind: str) -> str:
    """Return the kind of the names that answer a kind of question.

    >>> base_kind("territory_code"), base_kind("currency_of")
    ('territory', 'currency')
    """
    return kind.rsplit("_", 1)[0]


def answer(fact: Fact) -> str | None:
    """Return the true answer, or None if CLDR has none or copying the English name would answer."""
    base = base_kind(fact.kind)
    code = links(fact.kind).get(fact.code) if fact.kind in LINK_KINDS else fact.code
    name = own_names(base, fact.locale).get(code) if code else None
    if name is None or (fact.locale == "en" and fact.kind in NAME_KINDS):
        return None
    if fact.locale != "en" and name.casefold() == own_names(base, "en").get(code, "").casefold():
        return None
    return name


def is_unseen(fact: Fact) -> bool:
    """Return whether the fact is kept out of training.

    A hash decides, so that neither seed nor sample count changes it. The question for a name by its
    code shares the decision with the name itself, and a link (territory -> currency) shares it over
    all locales: otherwise the other one would reveal the answer. English names are never unseen,
    because questions contain them.
    """
    if fact.kind in LINK_KINDS:
        return stable_hash("unseen", fact.kind, fact.code) % 1000 < _UNSEEN_OF_1000
    return (
        fact.locale != "en"
        and stable_hash("unseen", base_kind(fact.kind), fact.code, fact.locale) % 1000
        < _UNSEEN_OF_1000
    )


def all_facts(
    locales: tuple[str, ...], kinds: tuple[str, ...] = KINDS, max_name_length: int | None = None
) -> list[Fact]:
    """Return every fact of these kinds and locales that has an answer and an English question.

    ``max_name_length`` drops facts whose English name or answer has more characters.

    Raises:
        DataError: A kind or locale does not exist, or English has no name for a locale, which
            questions need.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise DataError(
                f"--kinds: {kind!r} is no kind of question. Use some of {', '.join(KINDS)}."
            )
    for locale in locales:
        own_names("territory", locale)
        if locale not in own_names("language", "en"):
            raise DataError(
                f"--locales: English has no name for the language {locale!r}, so no question can"
                " ask for it. Leave it out."
            )
    longest = max_name_length or 10**6
    result = []
    for kind in kinds:
        names = own_names("territory" if kind in LINK_KINDS else base_kind(kind), "en")
        codes = sorted(code for code, name in names.items() if len(name) <= longest)
        for locale in locales:
            facts = (Fact(kind, code, locale) for code in codes)
            result += [
                fact
                for fact in facts
                if (name := answer(fact)) is not None and len(name) <= longest
            ]
    return result
