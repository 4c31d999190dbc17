"""Common base of rules that learn: coefficients that sum to 1, and state kept in a checkpoint."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_sorted.exits.coefficients import LOSSES, CoefficientRule


def as_shares(weights: Mapping[int, float]) -> dict[int, float]:
    """Return the weights divided by their sum.

    >>> as_shares({4: 1.0, 8: 3.0})
    {4: 0.25, 8: 0.75}
    """
    total = sum(weights.values())
    return {depth: weight / total for depth, weight in weights.items()}


class LearnedRule(CoefficientRule):
    """A rule whose state consists of tables {depth: number} and plain numbers, each an attribute.

    The state of an exit changes only at steps at which it trained: it may not have been drawn, or a
    curriculum may have switched it off.

    Attributes:
        name: Name of the rule in the settings; kept with the state.
        tables: Names of the attributes that are tables.
        plain: Names of the attributes that are numbers or None.
    """

    name = ""
    tables: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()

    def __init__(self, depths: Sequence[int]):
        self.depths = tuple(sorted(depths))

    @property
    def normalised(self) -> bool:
        """Return True: coefficients sum to 1."""
        return True

    @property
    def needs(self) -> frozenset[str]:
        """Return the losses: most learned rules need nothing else."""
        return frozenset({LOSSES})

    def state_dict(self) -> dict[str, Any]:
        """Return the rule's name, its tables with depths as text, and its plain numbers."""
        state: dict[str, Any] = {"rule": self.name}
        state |= {
            table: {str(depth): value for depth, value in getattr(self, table).items()}
            for table in self.tables
        }
        return state | {name: getattr(self, name) for name in self.plain}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state of the same rule; ignore another rule's.

        An exit that the state does not know keeps its initial values.
        """
        state = state.get("below", state)  # saved under a guard
        if state.get("rule") != self.name:
            return
        for table in self.tables:
            stored = {int(depth): value for depth, value in state[table].items()}
            getattr(self, table).update(
                {depth: value for depth, value in stored.items() if depth in self.depths}
            )
        for name in self.plain:
            setattr(self, name, state[name])


def mean(values: Iterable[float]) -> float:
    """Return the mean of at least one number."""
    listed = list(values)
    return sum(listed) / len(listed)
