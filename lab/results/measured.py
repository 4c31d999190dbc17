"""The measured numbers of all seeds, by model and depth."""

from dataclasses import dataclass
from statistics import fmean, stdev

from lab.results.rates import read_json
from lab.results.recipe import HEADS, Recipe, evaluation_folder
from megatron_sorted.errors import DataError

NAMES = {
    "before": "before",
    "ordinary": "ordinary fine-tuning",
    HEADS: "SFT+ICT",
    "nested": "nested fine-tuning",
    "nested-linear": "nested, linear weights",
}


@dataclass(frozen=True)
class Number:
    """A mean over seeds.

    Attributes:
        error: Standard error over documents (or questions), mean over seeds. All seeds are measured
            on the same ones, so more seeds do not make it smaller.
        spread: Standard deviation over seeds; None for a single one.
    """

    value: float
    error: float
    spread: float | None


class Numbers:
    """Measurements by ``megatron-sorted evaluate`` for one or more seeds."""

    def __init__(self, evaluations: list[dict]):
        self.evaluations = evaluations
        self.models = [name for name in NAMES if name in evaluations[0]["models"]]
        self.costs = {
            int(depth): cost
            for depth, cost in evaluations[0]["models"]["ordinary"]["exits"].items()
        }
        self.depths = sorted(self.costs)

    def names(self, kind: str) -> list[str]:
        """Return the names of the measured ``texts`` or ``questions``."""
        return list(self.evaluations[0][kind])

    def number(self, kind: str, name: str, model: str, depth: int, score: str) -> Number:
        """Return ``loss`` of a text, or ``exact_match`` of a question set."""
        measured = [exits[str(depth)] for exits in self._exits(kind, name, model)]
        return _mean([(one[score], one[f"{score}_standard_error"]) for one in measured])

    def difference(
        self, kind: str, name: str, model: str, other: str, depth: int, score: str
    ) -> Number:
        """Return the paired difference of two models; ``other`` is ``ordinary`` or SFT+ICT."""
        measured = [
            exits[str(depth)][f"{score}_minus"][other] for exits in self._exits(kind, name, model)
        ]
        return _mean([(one["value"], one["standard_error"]) for one in measured])

    def _exits(self, kind: str, name: str, model: str) -> list[dict]:
        measured = [one[kind][name]["models"] for one in self.evaluations]
        return [models[model]["exits"] for models in measured if model in models]


def read_numbers(recipe: Recipe, seeds: int) -> Numbers:
    """Return the numbers of all seeds.

    Raises:
        DataError: An evaluation cannot be read, or lacks something.
    """
    evaluations = []
    for seed in range(1, seeds + 1):
        path = evaluation_folder(recipe, seed) / "evaluation.json"
        evaluations.append(read_json(path))
        if not {"ordinary", "nested", HEADS} <= set(evaluations[-1].get("models", {})):
            raise DataError(
                f"{path}: it lacks the ordinary or the nested model. Start again with --fresh."
            )
    return Numbers(evaluations)


def _mean(pairs: list[tuple[float, float | None]]) -> Number:
    values = [value for value, _ in pairs]
    return Number(
        fmean(values),
        fmean(error or 0.0 for _, error in pairs),
        stdev(values) if len(values) > 1 else None,
    )
