"""The model's names for clients, one for each exit, and the strategy that a request asks for."""

from collections.abc import Callable
from typing import Any

from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.requested_strategy import check_strategy
from megatron_sorted.decoding.strategies import EarlyExit, Fixed, Full, Strategy
from megatron_sorted.errors import SortedError
from megatron_sorted.serving.answers import RefusedError
from megatron_sorted.serving.job import check_scoring
from megatron_sorted.serving.requests import TextRequest, excerpt


class ServedModels:
    """One model under its own name and, as NAME@DEPTH, at each of its exits.

    Args:
        name: The model's name.
        network: The model.
        strategy_of: Maps a strategy's name to an object: None to the server's own; returns None
            where the worker is to choose.

    Attributes:
        names: The depth of each name; None for the model's own.
    """

    def __init__(
        self, name: str, network: Network, strategy_of: Callable[[str | None], Strategy | None]
    ):
        self.name, self.network, self.strategy_of = name, network, strategy_of
        self.names = {name: None} | {f"{name}@{depth}": depth for depth in network.depths}

    def entry(self, name: str) -> dict[str, Any]:
        """Return what clients learn about a name.

        Raises:
            RefusedError: There is no such model.
        """
        self.check(name)
        depth = self.names[name]
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "megatron_sorted",
            "exits": list(self.network.depths),
            **({} if depth is None else {"depth": depth}),
        }

    def entries(self) -> list[dict[str, Any]]:
        """Return the entries of all names; the model's own comes first."""
        return [self.entry(name) for name in self.names]

    def check(self, name: str) -> None:
        """Check that a name is served.

        Raises:
            RefusedError: It is not; says which are.
        """
        if name not in self.names:
            exits = ", ".join(f"@{depth}" for depth in self.network.depths)
            raise RefusedError(
                f"model: {excerpt(name)} is not served here, only {self.name!r}, alone or with "
                f"one of {exits} behind it. Change it, or leave it out.",
                "model",
                404,
            )

    def strategy(self, request: TextRequest) -> Strategy | None:
        """Return the strategy of a request, by its model's name, depth, confidence or strategy.

        None where the worker is to choose.

        Raises:
            RefusedError: The model does not support it, or two fields contradict each other.
        """
        field, strategy = self._exits_of(request)
        if strategy is None:
            field = "strategy"
        else:
            _check_agreement(request, field, strategy)
        try:
            if strategy is None:
                strategy = self.strategy_of(request.strategy)
            else:
                check_strategy(strategy, self.network)
            if request.num_top_logprobs is not None:
                check_scoring(strategy)
        except SortedError as error:
            raise RefusedError(str(error), field) from error
        return strategy

    def _exits_of(self, request: TextRequest) -> tuple[str, Strategy | None]:
        """Return the strategy that a depth or a confidence asks for, and the field that does."""
        named = self.names.get(request.model or self.name)
        if request.depth is not None and named not in (None, request.depth):
            raise RefusedError(
                f"depth: {request.depth} is not that of the model {request.model!r}. "
                "Leave out one of them.",
                "depth",
            )
        field, depth = ("model", named) if request.depth is None else ("depth", request.depth)
        if request.confidence is not None:
            if depth is not None:
                raise RefusedError(
                    f"confidence: {request.confidence} chooses the depth of each token, and "
                    f"{field} names one depth for all. Leave out one of them.",
                    "confidence",
                )
            exits = self.network.depths[:-1]
            return "confidence", EarlyExit(exits, (request.confidence,) * len(exits))
        if depth is None:
            return field, None
        if depth not in self.network.depths:
            raise RefusedError(
                f"depth: {depth} is no exit of this model. "
                f"Use one of {', '.join(map(str, self.network.depths))}.",
                "depth",
            )
        return field, Full() if depth == self.network.num_layers else Fixed(depth)


def _check_agreement(request: TextRequest, field: str, strategy: Strategy) -> None:
    """Check that a request's strategy is the one that another of its fields stands for."""
    if request.strategy not in (None, strategy.name):
        value = request.model if field == "model" else getattr(request, field)
        raise RefusedError(
            f"strategy: {request.strategy} contradicts {field} {excerpt(value)}, which stands for "
            f"strategy {strategy.name}. Leave out one of them.",
            "strategy",
        )
