"""The fp32 weights that a rank's optimizer updates, and tensors like them in a checkpoint.

Which part of a parameter a rank updates depends on the layout and the optimizer: all of it, a range
of its elements (distributed optimizer) or some rows (``parallel.fsdp``). Another tensor of such a
part, such as its average, is stored as that part of a whole tensor, so any layout can load it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_sorted.checkpoint.sharding.optimizer_shards import (
    own_rectangles,
    parts_of,
    rectangle_of,
)
from megatron_sorted.checkpoint.sharding.row_shards import keeps_rows, rectangles_of_rows

Rectangles = list[tuple[int, ShardedTensor]]


@dataclass(frozen=True)
class MainWeight:
    """The fp32 weights of a parameter that this rank's optimizer updates.

    Attributes:
        parameter: The model's parameter, or this rank's rows of it.
        tensor: The weights; the parameter's own memory where that is in fp32.
        elements: The elements of the parameter that they are, under the distributed optimizer; None
            for all.
    """

    parameter: torch.nn.Parameter
    tensor: torch.Tensor
    elements: Any = None


def main_weights(optimizer: Any) -> list[MainWeight]:
    """Return the weights that this rank's optimizer updates, in an order that never changes.

    Frozen parameters are not among them.
    """
    weights: list[MainWeight] = []
    for part in parts_of(optimizer):
        if getattr(part, "is_stub_optimizer", False):  # this rank trains nothing of its kind
            continue
        if isinstance(part, DistributedOptimizer):
            groups = part.optimizer.param_groups
            weights += [
                MainWeight(
                    parameter,
                    groups[group]["params"][place],
                    part._get_model_param_range_map(parameter)["param"],
                )
                for parameter, (group, place) in part.model_param_group_index_map.items()
            ]
        elif hasattr(part, "float16_groups"):
            halves = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
            for parameters, mains in halves:
                weights += map(MainWeight, parameters, mains)
            weights += [
                MainWeight(parameter, parameter)
                for parameters in part.fp32_from_fp32_groups
                for parameter in parameters
            ]
        else:
            weights += [
                MainWeight(parameter, parameter)
                for group in part.optimizer.param_groups
                for parameter in group["params"]
            ]
    return weights


def _rectangles(chunks: list, weights: list[MainWeight], states: Any) -> Iterator[Rectangles]:
    """Yield the rectangles of the whole tensor that each of ``weights`` is."""
    if keeps_rows(chunks[0]):
        of_rows = {id(shard.rows): own for shard, own in rectangles_of_rows(chunks[0])}
        yield from (of_rows[id(weight.parameter)] for weight in weights)
        return
    bases = {
        id(base.data): base
        for base in nested_values(states)
        if isinstance(base, ShardedTensor | ShardedTensorFactory)
    }
    for weight in weights:
        base, elements = bases[id(weight.parameter)], weight.elements
        if elements is None:
            yield list(own_rectangles(base, 0, weight.parameter.numel(), is_replicated=True))
        else:
            yield list(own_rectangles(base, elements.start, elements.end))


def states_like_weights(
    name: str, tensors: list[torch.Tensor], chunks: list, weights: list[MainWeight], states: Any
) -> dict[int, dict[int, ShardedTensor]]:
    """Return tensors of the shapes of ``weights`` as sharded tensors, to save or load in place.

    They are called ``name``.NAME in the checkpoint, where NAME is the weight's.

    Args:
        name: Name of the kind of tensors.
        tensors: A tensor for each of the weights.
        chunks: This rank's model chunks.
        weights: This rank's weights (``main_weights``).
        states: The chunks' sharded state dicts, for names and positions.
    """
    return {
        index: {
            first: replace(
                sharded, key=f"{name}.{sharded.key}", data=rectangle_of(tensor, first, sharded)
            )
            for first, sharded in rectangles
        }
        for index, (tensor, rectangles) in enumerate(
            zip(tensors, _rectangles(chunks, weights, states), strict=True)
        )
    }


def take_states(tensors: list[torch.Tensor], loaded: dict[int, dict[int, torch.Tensor]]) -> None:
    """Copy loaded tensors, requested by ``states_like_weights``, into ``tensors``."""
    for index, rectangles in loaded.items():
        for first, rectangle in rectangles.items():
            flat = tensors[index].view(-1)
            flat[first : first + rectangle.numel()].copy_(rectangle.reshape(-1))
