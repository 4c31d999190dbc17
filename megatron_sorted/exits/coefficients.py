"""How much each exit's loss counts at a step: rules of depth, lists, and their warm-up.

The loss of a step is sum_i c_i L_i over the exits i that train, with L_i the mean loss of exit i in
nats a token and c_i its coefficient.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_sorted.errors import SettingsError
from megatron_sorted.exits.depths import by_depth, normalise_depths

DEPTH_RULES: dict[str, Callable[[int], float]] = {
    "uniform": lambda depth: 1.0,
    "linear": lambda depth: float(depth),
    "sum": lambda depth: depth * (depth + 1) / 2,
    "sqrt": lambda depth: math.sqrt(depth),
    "inverse": lambda depth: 1 / depth,
    "inverse_sqrt": lambda depth: 1 / math.sqrt(depth),
}
"""Weight of a depth before the weights of all exits are divided by their sum."""

LAYERSKIP = "layerskip"
"""Name of the one rule of depth that also depends on the number of layers and a scale."""

WARMUPS: dict[str, Callable[[float], float]] = {
    "linear": lambda fraction: fraction,
    "cosine": lambda fraction: (1 - math.cos(math.pi * fraction)) / 2,
}
"""How far coefficients have moved (0..1) when this fraction (0..1) of the warm-up is over."""


LOSSES = "losses"
GRADIENTS = "gradients"
EXIT_LAYERS = "exit layers"
"""What a rule may need to know of a step; measured and summed over ranks only if it does."""


@dataclass(frozen=True)
class Observation:
    """Measurements of a step that the optimizer took, over the global batch; equal on every rank.

    Attributes:
        losses: Mean loss, in nats a token, of every exit that trained.
        coefficients: {depth: coefficient} that these exits trained with.
        grad_norms: Norm of the gradient that each of these exits sent into the hidden state below
            it, coefficient included.
        exit_shares: Share of the tokens, averaged over the rule's thresholds, for which this is the
            shallowest exit whose confidence exceeds the threshold; tokens for which none does count
            for the last exit. They sum to 1.
        confidences: Smallest and largest probability of a most likely token, over tokens and exits.
    """

    losses: Mapping[int, float]
    coefficients: Mapping[int, float]
    grad_norms: Mapping[int, float] = field(default_factory=dict)
    exit_shares: Mapping[int, float] = field(default_factory=dict)
    confidences: tuple[float, float] = (0.0, 1.0)


class CoefficientRule(ABC):
    """A rule that gives every exit its coefficient.

    A rule that learns also overrides the methods after `coefficients`.
    """

    @property
    @abstractmethod
    def normalised(self) -> bool:
        """Return whether coefficients are shares that sum to 1.

        Then the coefficients of a drawn subset are scaled to sum 1 again.
        """

    @abstractmethod
    def coefficients(self, step: int) -> dict[int, float]:
        """Return {depth: coefficient} of every exit at ``step``, which counts from 0."""

    @property
    def needs(self) -> frozenset[str]:
        """Return which measurements of a finished step the rule needs (see ``Observation``).

        A fixed rule needs none, and so costs nothing.
        """
        return frozenset()

    def thresholds(self, step: int) -> tuple[float, ...]:
        """Return the confidences above which a token would leave at an exit, increasing.

        Only rules that need ``EXIT_LAYERS`` give any.
        """
        return ()

    def observe(self, step: int, seen: Observation) -> None:
        """Record a finished step. Fixed rules ignore it."""

    def numbers(self) -> dict[str, float]:
        """Return {name: number} that a report shows beside the coefficients."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep of the rule; fixed rules have no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; fixed rules ignore it."""


@dataclass
class RuleOnTop(CoefficientRule):
    """A rule that changes the coefficients of another, the rule below.

    Methods that a sub-class does not override pass on to the rule below.

    Attributes:
        rule: The rule below.
    """

    rule: CoefficientRule

    @property
    def normalised(self) -> bool:
        """Return whether the coefficients of the rule below are shares."""
        return self.rule.normalised

    @property
    def needs(self) -> frozenset[str]:
        """Return which measurements the rule below needs."""
        return self.rule.needs

    def thresholds(self, step: int) -> tuple[float, ...]:
        """Return the thresholds of the rule below."""
        return self.rule.thresholds(step)

    def observe(self, step: int, seen: Observation) -> None:
        """Let the rule below record the step."""
        self.rule.observe(step, seen)

    def numbers(self) -> dict[str, float]:
        """Return the numbers that the rule below reports."""
        return self.rule.numbers()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the rule below."""
        return self.rule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state into the rule below."""
        self.rule.load_state_dict(state)


@dataclass(frozen=True)
class FixedCoefficients(CoefficientRule):
    """Coefficients that go from ``initial`` to ``final`` over the warm-up, then stay there.

    Attributes:
        final: {depth: coefficient} after the warm-up.
        initial: {depth: coefficient} at step 0 of the warm-up.
        warmup_iters: Steps of the warm-up; 0 for none.
        warmup_style: One of `WARMUPS`.
        shares: Whether the coefficients are shares that sum to 1.
    """

    final: dict[int, float]
    initial: dict[int, float]
    warmup_iters: int
    warmup_style: str
    shares: bool

    @property
    def normalised(self) -> bool:
        """Return True for a rule of depth and False for a list, which is used as it stands."""
        return self.shares

    def coefficients(self, step: int) -> dict[int, float]:
        """Return {depth: initial + (final - initial) * f(step / warm-up)} at ``step``."""
        if step >= self.warmup_iters:
            return dict(self.final)
        moved = WARMUPS[self.warmup_style](step / self.warmup_iters)
        return {
            depth: self.initial[depth] + (final - self.initial[depth]) * moved
            for depth, final in self.final.items()
        }


def layerskip_weight(depth: int, num_layers: int, scale: float) -> float:
    """Return LayerSkip's weight of a depth: quadratic in it, times ``scale`` below the last layer.

    With layers counted from 0, l = depth - 1:

        e(l)     = scale * sum_{i <= l} i                 below the last layer L - 1
        e(L - 1) = L - 1 + scale * sum_{i <= L - 2} i

    So an exit after the first layer has weight 0, unless it is the only layer.

    Source: LayerSkip, arXiv 2404.16710, section 4.1.2.
    """
    layer = depth - 1
    if depth < num_layers:
        return scale * layer * (layer + 1) / 2
    return layer + scale * (layer - 1) * layer / 2 if layer else 1.0


def coefficients_by_rule(
    rule: str, depths: Sequence[int], num_layers: int = 0, scale: float = 1.0
) -> dict[int, float]:
    """Return {depth: coefficient} of a named rule of depth; they sum to 1.

    >>> coefficients_by_rule("linear", [1, 3])
    {1: 0.25, 3: 0.75}

    Args:
        rule: One of `DEPTH_RULES`, or "layerskip".
        depths: Depths of all exits.
        num_layers: Depth of the last layer; needed by "layerskip" alone.
        scale: Scale of "layerskip".
    """
    weights = {
        depth: layerskip_weight(depth, num_layers, scale)
        if rule == LAYERSKIP
        else DEPTH_RULES[rule](depth)
        for depth in depths
    }
    total = sum(weights.values())
    return {depth: weight / total for depth, weight in weights.items()}


@dataclass(frozen=True)
class Weighting:
    """Settings of a fixed rule.

    Attributes:
        rule: Named rule of depth, used when ``weights`` is empty.
        weights: One coefficient per exit, in the order in which exits are listed; the last layer
            counts 1 when it has none.
        initial: Coefficients at step 0 of a warm-up, in the same order; 0 for all but the last
            layer when empty. The last layer moves only if it has a value here.
        warmup_iters: Steps of the warm-up; 0 for none.
        warmup_style: One of `WARMUPS`.
        scale: Scale of the rule "layerskip".
    """

    rule: str = "uniform"
    weights: Sequence[float] = ()
    initial: Sequence[float] = ()
    warmup_iters: int = 0
    warmup_style: str = "linear"
    scale: float = 1.0


def make_coefficient_rule(
    exit_layer_nums: Sequence[int], num_layers: int, weighting: Weighting
) -> CoefficientRule:
    """Build the fixed rule that settings describe.

    Args:
        exit_layer_nums: Depths of the exits, with or without the last layer.
        num_layers: Depth of the last exit.
        weighting: Settings of the rule.

    Raises:
        SettingsError: A list does not fit the exits, has a negative coefficient or only zeros, or
            ``initial`` is given without a warm-up.
    """
    weights, initial, warmup_iters = weighting.weights, weighting.initial, weighting.warmup_iters
    depths = normalise_depths(exit_layer_nums, num_layers)
    if weights:
        listed = _checked("--exit-layer-weight", weights, exit_layer_nums, num_layers)
        final = {depth: listed.get(depth, 1.0) for depth in depths}
    else:
        final = coefficients_by_rule(weighting.rule, depths, num_layers, weighting.scale)
    if initial and not warmup_iters:
        raise SettingsError(
            "--exit-layer-weight-init: it has no effect without a warm-up "
            "(--exit-layer-weight-warmup-iters 0). "
            "Give the warm-up's number of steps or leave the list out."
        )
    start = dict.fromkeys(depths, 0.0) | {num_layers: final[num_layers]}
    if initial:
        start |= _checked("--exit-layer-weight-init", initial, exit_layer_nums, num_layers)
    for name, coefficients in (("--exit-layer-weight", final), ("--exit-layer-weight-init", start)):
        # without a warm-up no step uses ``start``
        is_used = warmup_iters or coefficients is final
        if is_used and not any(coefficients.values()):
            raise SettingsError(
                f"{name}: every coefficient is 0, so nothing would be trained. "
                "Give one exit a positive one."
            )
    return FixedCoefficients(final, start, warmup_iters, weighting.warmup_style, shares=not weights)


def _checked(
    name: str, values: Sequence[float], exit_layer_nums: Sequence[int], num_layers: int
) -> dict[int, float]:
    for value in values:
        if value < 0:
            raise SettingsError(
                f"{name}: {value} is negative, so training would raise that exit's loss. "
                "Give 0 or more."
            )
    return by_depth(name, values, exit_layer_nums, num_layers)
