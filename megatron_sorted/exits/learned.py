"""What rules that learn have in common: shares of one whole, a few numbers an exit, and their state in a checkpoint."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_sorted.exits.coefficients import LOSSES, CoefficientRule


def as_shares(weights: Mapping[int, float]) -> dict[int, float]:
    """Return weights divided by their sum."""
    total = sum(weights.values())
    return {depth: weight / total for depth, weight in weights.items()}


class LearnedRule(CoefficientRule):
    """A rule whose state is some tables {depth: number}, each an attribute, and some plain numbers.

    An exit that did not train at a step, because it was not drawn or a curriculum had it off, leaves that step's state of it as it was.

    Attributes:
        name: Of the rule in the settings; kept with the state.
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
        """Return True: coefficients are shares of one whole."""
        return True

    @property
    def needs(self) -> frozenset[str]:
        """Return what the rule is told: the losses."""
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
        """Load a state of the same rule; ignore another's. An exit that the state does not know starts anew."""
        state = state.get("below", state)  # saved under a guard
        if state.get("rule") != self.name:
            return
        for table in self.tables:
            found = {int(depth): value for depth, value in state[table].items()}
            getattr(self, table).update(
                {depth: value for depth, value in found.items() if depth in self.depths}
            )
        for name in self.plain:
            setattr(self, name, state[name])


def mean(values: Iterable[float]) -> float:
    """Return the mean of one number or more."""
    listed = list(values)
    return sum(listed) / len(listed)
