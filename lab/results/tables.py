"""The tables of a page, and the findings they hold as sentences."""

from lab.results.measured import NAMES, Number, Numbers
from lab.results.recipe import HEADS
from megatron_sorted.reporting.markdown import table

SCORES = {"texts": "loss", "questions": "exact_match"}


def show(number: Number, kind: str, sign: str = "") -> str:
    """Return value and standard error: nats with three decimals, shares in percent."""
    if kind == "texts":
        return f"{number.value:{sign}.3f} ± {number.error:.3f}"
    return f"{100 * number.value:{sign}.1f} % ± {100 * number.error:.1f}"


def measures_table(numbers: Numbers, kind: str, name: str, exits: tuple[int, ...]) -> list[str]:
    """Return one row per depth and one column per method.

    A star marks depths that nested training does not train.
    """
    rows = []
    for depth in numbers.depths:
        cost = numbers.costs[depth]
        star = "" if depth in exits or depth == numbers.depths[-1] else " *"
        share = cost["flops_per_token"] / numbers.costs[numbers.depths[-1]]["flops_per_token"]
        rows.append(
            [
                f"{depth}{star}",
                f"{cost['parameters']:,}",
                f"{100 * share:.0f} %",
                *(
                    show(numbers.number(kind, name, model, depth, SCORES[kind]), kind)
                    for model in numbers.models
                ),
            ]
        )
    return table(
        ["depth", "parameters", "FLOPs", *(NAMES[model] for model in numbers.models)], rows
    )


def differences_table(numbers: Numbers, kind: str, name: str) -> list[str]:
    """Return the paired differences of the nested models to the ordinary one and to SFT+ICT."""
    nested = [model for model in numbers.models if model.startswith("nested")]
    pairs = [(model, other) for model in nested for other in ("ordinary", HEADS)]
    rows = [
        [
            str(depth),
            *(
                show(numbers.difference(kind, name, model, other, depth, SCORES[kind]), kind, "+")
                for model, other in pairs
            ),
        ]
        for depth in numbers.depths
    ]
    return table(["depth", *(f"{NAMES[model]} - {NAMES[other]}" for model, other in pairs)], rows)


def spread_table(numbers: Numbers, kind: str, name: str) -> list[str]:
    """Return the standard deviation over seeds of every trained model; empty for one seed."""
    trained = [model for model in numbers.models if model != "before"]
    if len(numbers.evaluations) < 2:
        return []
    rows = [
        [
            str(depth),
            *(
                _spread(numbers.number(kind, name, model, depth, SCORES[kind]), kind)
                for model in trained
            ),
        ]
        for depth in numbers.depths
    ]
    return [
        f"Standard deviation over {len(numbers.evaluations)} seeds (order of the data),"
        " same columns:",
        "",
        *table(["depth", *(NAMES[model] for model in trained)], rows),
    ]


def findings(numbers: Numbers, name: str, exits: tuple[int, ...]) -> list[str]:
    """Return the findings on the losses of a text, as lines of a list."""

    def loss(model: str, depth: int) -> float:
        return numbers.number("texts", name, model, depth, "loss").value

    last, first = numbers.depths[-1], exits[0]
    cost = numbers.difference("texts", name, "nested", "ordinary", last, "loss")
    lines = [
        f"- **Intermediate depths learn to predict.** After {first} of {last} layers:"
        f" {loss('before', first):.2f} nats per token before, {loss('ordinary', first):.2f} after"
        f" ordinary fine-tuning, {loss('nested', first):.2f} after nested fine-tuning of equal"
        " length.",
        f"- **{describe_cost(cost)} at full depth**: {show(cost, 'texts', '+')} nats against"
        f" ordinary fine-tuning ({100 * cost.value / loss('ordinary', last):+.1f} %; paired over"
        " documents).",
    ]
    if "nested-linear" in numbers.models:
        other = numbers.difference("texts", name, "nested-linear", "ordinary", last, "loss")
        lines.append(
            f"- **Loss weights linear in depth** move along that exchange:"
            f" {show(other, 'texts', '+')} at full depth, {loss('nested-linear', first):.3f}"
            f" instead of {loss('nested', first):.3f} at depth {first}."
        )
    against = [
        (depth, numbers.difference("texts", name, "nested", HEADS, depth, "loss"))
        for depth in exits
    ]
    better = [depth for depth, number in against if number.value < 0]
    differences = ", ".join(f"{number.value:+.3f} at depth {depth}" for depth, number in against)
    place = (
        "ahead at every exit"
        if len(better) == len(exits)
        else f"ahead at {better}"
        if better
        else "behind at every exit"
    )
    lines.append(
        "- **Against heads on frozen layers (SFT+ICT)**, which have a norm and a head of their own"
        f" at each depth, nested training is {place}: {differences}. SFT+ICT leaves the last depth"
        " unchanged; nested training adds no parameter."
    )
    return lines


def describe_cost(difference: Number) -> str:
    """Name a difference in loss; within two standard errors it is none."""
    if abs(difference.value) <= 2 * difference.error:
        return "No difference that stands out"
    return "It costs something" if difference.value > 0 else "It is ahead"


def answers_finding(numbers: Numbers, name: str) -> str:
    """Return the exact match of a question set at the first and last depth, as a line of a list."""

    def right(depth: int) -> str:
        shares = {
            model: 100 * numbers.number("questions", name, model, depth, "exact_match").value
            for model in numbers.models
        }
        return ", ".join(f"{NAMES[model]} {share:.1f} %" for model, share in shares.items())

    first, last = numbers.depths[0], numbers.depths[-1]
    return (
        f"- **Answers, {name}**: {first} of {last} layers: {right(first)};"
        f" all {last}: {right(last)}."
    )


def _spread(number: Number, kind: str) -> str:
    value = number.spread or 0.0
    return f"{value:.4f}" if kind == "texts" else f"{100 * value:.1f} %"
