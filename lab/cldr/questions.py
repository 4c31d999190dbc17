"""Questions about facts: the phrasings of each, and the three sets train, phrasing and unseen.

Every choice is a hash of what is chosen, so a longer set begins with the facts and phrasings of a
shorter one.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice

from lab.cldr.facts import (
    CODE_KINDS,
    KINDS,
    LINK_KINDS,
    NAME_KINDS,
    Fact,
    all_facts,
    answer,
    base_kind,
    is_unseen,
    own_names,
    stable_hash,
)
from lab.cldr.phrasings import (
    ENGLISH_CODE,
    ENGLISH_LINK,
    ENGLISH_NAME,
    ENGLISH_NOUNS,
    ENGLISH_THINGS,
    NAME_IN,
)
from megatron_sorted.errors import DataError

ASKING_LOCALES = ("en", *NAME_IN)


@dataclass(frozen=True)
class QuestionSample:
    """One line of a question file; ``language`` is the locale of the answer."""

    instruction: str
    input: str
    output: str
    language: str
    kind: str
    fact: str

    def as_dict(self) -> dict[str, str]:
        """Return the JSON object of this sample."""
        return asdict(self)


@dataclass(frozen=True)
class QuestionPlan:
    """The facts to train, the facts that are never trained, and the languages of the questions.

    ``trained`` and ``unseen`` are in an order drawn by the seed; a smaller ``max_facts`` keeps a
    beginning of them.
    """

    trained: tuple[Fact, ...]
    unseen: tuple[Fact, ...]
    asking: tuple[str, ...]

    def capacity(self) -> int:
        """Return the number of training samples: phrasings of all trained facts."""
        return sum(len(phrasings(fact, self.asking)) for fact in self.trained)

    def train(self, num_samples: int) -> Iterator[QuestionSample]:
        """Yield different training samples: every fact once before any fact a second time.

        Raises:
            DataError: There are fewer.
        """
        if num_samples > (capacity := self.capacity()):
            raise DataError(
                f"--num-samples: {num_samples:,} is more than the {capacity:,} questions there are."
                " Ask for fewer, or give more --locales, --asking-locales or --kinds, or a larger"
                " --max-facts."
            )
        return islice(_in_rounds(self.trained, self.asking, held_out=False), num_samples)

    def phrasing(self, num_facts: int, num_samples: int) -> list[QuestionSample]:
        """Return up to ``num_samples`` questions in phrasings that are never trained.

        They are about the first ``num_facts`` trained facts.
        """
        return list(
            islice(_in_rounds(self.trained[:num_facts], self.asking, held_out=True), num_samples)
        )

    def never_trained(self, num_samples: int) -> list[QuestionSample]:
        """Return questions about facts that are never trained, each once, in trained phrasings."""
        return list(
            islice(
                _in_rounds(self.unseen[:num_samples], self.asking, held_out=False),
                min(num_samples, len(self.unseen)),
            )
        )


def _in_rounds(
    facts: tuple[Fact, ...], asking: tuple[str, ...], held_out: bool
) -> Iterator[QuestionSample]:
    """Yield every question about ``facts``, one phrasing of each fact in every round.

    Each fact starts with a phrasing of its own.
    """
    remaining, turn = facts, 0
    while remaining:
        left = []
        for fact in remaining:
            templates = phrasings(fact, asking, held_out)
            yield ask(fact, *templates[(stable_hash("start", fact) + turn) % len(templates)])
            if turn + 1 < len(templates):
                left.append(fact)
        remaining = left
        turn += 1


def plan_questions(
    locales: tuple[str, ...],
    asking: tuple[str, ...] = ASKING_LOCALES,
    kinds: tuple[str, ...] = KINDS,
    *,
    seed: int = 1234,
    max_facts: int | None = None,
    max_name_length: int | None = None,
) -> QuestionPlan:
    """Return the plan of all questions; ``max_facts`` bounds the trained facts.

    Raises:
        DataError: A locale, a language of asking or a kind does not exist.
    """
    for locale in asking:
        if locale not in ASKING_LOCALES:
            raise DataError(
                f"--asking-locales: no questions are written in {locale!r}."
                f" Use some of {', '.join(ASKING_LOCALES)}."
            )
    askable = [
        fact for fact in all_facts(locales, kinds, max_name_length) if phrasings(fact, asking)
    ]
    askable.sort(key=lambda fact: stable_hash("order", seed, fact))
    trained = [fact for fact in askable if not is_unseen(fact)]
    return QuestionPlan(
        tuple(trained[:max_facts]),
        tuple(fact for fact in askable if is_unseen(fact)),
        tuple(asking),
    )


def phrasings(fact: Fact, asking: tuple[str, ...], held_out: bool = False) -> list[tuple[str, str]]:
    """Return (language of the question, template) for every phrasing of this fact.

    A question is in a language other than English only if that language's own name is no unseen
    fact (the question would show it), means one thing, and differs from the answer.
    """
    numbered = []
    for locale in asking:
        if locale == "en":
            table = (
                ENGLISH_CODE
                if fact.kind in CODE_KINDS
                else ENGLISH_LINK.get(fact.kind, ENGLISH_NAME)
            )
        elif fact.kind in NAME_KINDS and locale != fact.locale and _can_ask_in(fact, locale):
            table = NAME_IN[locale]
        else:
            continue
        numbered += [
            (order, locale, template)
            for order, template in enumerate(table.held_out if held_out else table.train)
        ]
    return [
        (locale, template) for _, locale, template in sorted(numbered, key=lambda entry: entry[0])
    ]  # languages take turns


def _can_ask_in(fact: Fact, locale: str) -> bool:
    """Return whether a question in ``locale`` is unambiguous and does not contain the answer."""
    name = _asking_names(fact.kind, locale).get(fact.code)
    return (
        name is not None
        and fact.locale in own_names("language", locale)
        and name.casefold() != answer(fact).casefold()
    )


@cache
def _asking_names(kind: str, locale: str) -> dict[str, str]:
    """Return {code: name} of names that no thing of another kind has and that are no unseen facts.

    The templates of other languages contain no noun, so a name must be unambiguous by itself
    (within a kind, CLDR's names differ). Scripts share their names with languages, so questions
    about them are in English only.
    """
    if kind == "script":
        return {}
    others = {
        name.casefold()
        for other in NAME_KINDS
        if other not in (kind, "script")
        for name in own_names(other, locale).values()
    }
    return {
        code: name
        for code, name in own_names(kind, locale).items()
        if name.casefold() not in others and not is_unseen(Fact(kind, code, locale))
    }


def ask(fact: Fact, locale: str, template: str) -> QuestionSample:
    """Return the sample that asks for ``fact`` with ``template``, written in ``locale``."""
    base = base_kind(fact.kind)
    name = own_names("territory" if fact.kind in LINK_KINDS else base, locale).get(fact.code, "")
    noun, label = ENGLISH_NOUNS[base]
    parts = {
        "name": name,
        "thing": ENGLISH_THINGS[base].format(name=name) if locale == "en" else name,
        "code": fact.code,
        "noun": noun,
        "label": label,
        "language": own_names("language", locale)[fact.locale],
    }
    instruction, _, given = template.partition("\n")
    return QuestionSample(
        instruction.format(**parts),
        given.format(**parts),
        answer(fact),
        fact.locale,
        fact.kind,
        str(fact),
    )
