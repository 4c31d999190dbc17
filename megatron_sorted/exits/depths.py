"""Depths at which the network may stop.

A depth is a number of layers run; the last layer always is an exit.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from megatron_sorted.errors import SettingsError

Value = TypeVar("Value")


def normalise_depths(exit_layer_nums: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return all depths in increasing order; ``num_layers`` is the last, whether listed or not.

    >>> normalise_depths([8, 4], num_layers=12)
    (4, 8, 12)

    Raises:
        SettingsError: A depth is not a layer of the network, or is listed twice.
    """
    for depth in exit_layer_nums:
        if not 1 <= depth <= num_layers:
            raise SettingsError(
                f"--exit-layer-nums: {depth} is not a layer of this model "
                f"(--num-layers {num_layers}). Use 1..{num_layers}."
            )
    for depth, times in Counter(exit_layer_nums).items():
        if times > 1:
            raise SettingsError(
                f"--exit-layer-nums: {depth} is listed more than once. Name every depth once."
            )
    return tuple(sorted({*exit_layer_nums, num_layers}))


def listed_order(exit_layer_nums: Sequence[int], num_layers: int) -> list[int]:
    """Return the depths in the order in which lists give one value per exit.

    The order is that of ``exit_layer_nums``; the last layer stands at the end unless listed.

    >>> listed_order([8, 4], num_layers=12)
    [8, 4, 12]
    """
    is_listed = num_layers in exit_layer_nums
    return [*exit_layer_nums] if is_listed else [*exit_layer_nums, num_layers]


def by_depth(
    name: str, values: Sequence[Value], exit_layer_nums: Sequence[int], num_layers: int
) -> dict[int, Value]:
    """Return {depth: value} for a list that gives one value per exit.

    Values stand in ``listed_order``. The last layer's value may be left out, and is then absent
    from the result.

    >>> by_depth("--exit-layer-weight", [0.5, 0.25, 1.0], [8, 4], num_layers=12)
    {8: 0.5, 4: 0.25, 12: 1.0}

    Args:
        name: The setting the values come from, for messages, such as ``--exit-layer-weight``.
        values: One value per exit.
        exit_layer_nums: Depths of the exits as listed, with or without the last layer.
        num_layers: Depth of the last exit.

    Raises:
        SettingsError: The number of values fits neither all exits nor all but the last.
    """
    order = listed_order(exit_layer_nums, num_layers)
    if len(values) == len(order) - 1:
        order.remove(num_layers)
    if len(values) != len(order):
        raise SettingsError(
            f"{name}: {len(values)} values for {len(order)} exits "
            f"(depths {', '.join(map(str, order))}). "
            f"Give {len(order) - 1} (without the last layer) or {len(order)}."
        )
    return dict(zip(order, values, strict=True))
