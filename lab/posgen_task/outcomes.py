"""Accuracies of PosGen within and beyond the training length, by task, frequencies and exit."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from lab.posgen_task.plan import LENGTH, READ, TRAINED, PosGenPlan
from lab.results.rates import read_json
from lab.studies.outcomes import Estimate, estimate
from megatron_sorted.installation import ROOT

NAMES = tuple(f"{trained}{read}" for trained in TRAINED for read in READ)
"""Frequencies in training and in reading, as models are called."""


@dataclass(frozen=True)
class Row:
    """The measurements of one exit of one model.

    Attributes:
        task, seed: Task, and seed of the training.
        name: One of ``NAMES``.
        exit: Depth of the exit.
        lasts: Last position of each bucket.
        tokens: Counted tokens of each bucket.
        accuracy: Share of them that are predicted.
        loss: Their mean loss in nats.
    """

    task: str
    seed: int
    name: str
    exit: int
    lasts: list[int]
    tokens: list[int]
    accuracy: list[float]
    loss: list[float]

    def mean_accuracy(self, beyond: bool) -> float:
        """Return the accuracy on all positions within the training length, or beyond it."""
        inside = [
            (tokens, accuracy)
            for last, tokens, accuracy in zip(self.lasts, self.tokens, self.accuracy, strict=True)
            if (last > LENGTH) == beyond
        ]
        return sum(tokens * accuracy for tokens, accuracy in inside) / sum(one[0] for one in inside)


def read_rows(plan: PosGenPlan) -> list[Row]:
    """Return the rows of all measurements.

    Raises:
        DataError: A file of measurements cannot be read.
    """
    rows = []
    for task in plan.tasks:
        for seed in range(1, plan.seeds + 1):
            results = read_json(ROOT / plan.measured(task, seed))
            lasts = [last for _, last in results["settings"]["positions"]["buckets"]]
            for name in NAMES:
                buckets = results["positions"]["test"]["models"][name]["buckets"]
                for depth in buckets[0]:
                    columns = {
                        key: [bucket[depth][key] for bucket in buckets]
                        for key in ("tokens", "accuracy", "loss")
                    }
                    rows.append(Row(task, seed, name, int(depth), lasts, **columns))
    return rows


def as_records(rows: Sequence[Row]) -> list[dict]:
    """Return rows as JSON holds them, with numbers of six digits."""
    return [
        {
            key: [round(one, 6) for one in value] if key in ("accuracy", "loss") else value
            for key, value in asdict(row).items()
        }
        for row in rows
    ]


class Outcomes:
    """Means over seeds of rows.

    Attributes:
        tasks, depths: Tasks and exits, in order.
        num_seeds: Number of seeds.
    """

    def __init__(self, rows: Sequence[Row]):
        self._rows = {(row.task, row.seed, row.name, row.exit): row for row in rows}
        self.tasks = list(dict.fromkeys(row.task for row in rows))
        self.depths = sorted({row.exit for row in rows})
        self._seeds = sorted({row.seed for row in rows})
        self.num_seeds = len(self._seeds)

    def accuracy(self, task: str, name: str, depth: int, beyond: bool) -> Estimate:
        """Return the accuracy in percent."""
        return estimate([100 * one for one in self._accuracies(task, name, depth, beyond)])

    def difference(self, task: str, name: str, other: str, depth: int) -> Estimate:
        """Return how many points ``name`` is above ``other`` beyond the training length, paired."""
        pairs = zip(
            self._accuracies(task, name, depth, True),
            self._accuracies(task, other, depth, True),
            strict=True,
        )
        return estimate([100 * (mine - theirs) for mine, theirs in pairs])

    def curve(self, task: str, name: str, depth: int) -> tuple[list[int], list[float]]:
        """Return the last position of each bucket, and the mean accuracy in it over seeds."""
        rows = [self._rows[task, seed, name, depth] for seed in self._seeds]
        columns = zip(*(row.accuracy for row in rows), strict=True)
        return rows[0].lasts, [sum(column) / len(column) for column in columns]

    def _accuracies(self, task: str, name: str, depth: int, beyond: bool) -> list[float]:
        return [self._rows[task, seed, name, depth].mean_accuracy(beyond) for seed in self._seeds]
