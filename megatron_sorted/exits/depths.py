"""Depths at which the network may stop. A depth is a number of layers run; the last layer always is an exit."""

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from megatron_sorted.errors import SettingsError

Value = TypeVar("Value")


def normalise_depths(exit_layer_nums: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return all depths in increasing order, ``num_layers`` the last of them whether listed or not.

    Raises:
        SettingsError: a depth is not a layer of the network, or is listed twice.
    """
    for depth in exit_layer_nums:
        if not 1 <= depth <= num_layers:
            raise SettingsError(
                f"--exit-layer-nums: {depth} is not a layer of this model (--num-layers {num_layers}). Use 1..{num_layers}."
            )
    for depth, times in Counter(exit_layer_nums).items():
        if times > 1:
            raise SettingsError(
                f"--exit-layer-nums: {depth} is listed more than once. Name every depth once."
            )
    return tuple(sorted({*exit_layer_nums, num_layers}))


def by_depth(
    name: str, values: Sequence[Value], exit_layer_nums: Sequence[int], num_layers: int
) -> dict[int, Value]:
    """Return {depth: value} of a list of one value per exit.

    Values stand in the order of ``exit_layer_nums``. The last layer's value may be left out, and is then absent from the
    result; where the last layer is not listed as an exit, its value stands at the end.

    Args:
        name: the setting the values come from, for messages, such as ``--exit-layer-weight``.

    Raises:
        SettingsError: the number of values fits neither all exits nor all but the last.
    """
    order = [*exit_layer_nums] if num_layers in exit_layer_nums else [*exit_layer_nums, num_layers]
    if len(values) == len(order) - 1:
        order.remove(num_layers)
    if len(values) != len(order):
        raise SettingsError(
            f"{name}: {len(values)} values for {len(order)} exits (depths {', '.join(map(str, order))}). "
            f"Give {len(order) - 1} (without the last layer) or {len(order)}."
        )
    return dict(zip(order, values, strict=True))
