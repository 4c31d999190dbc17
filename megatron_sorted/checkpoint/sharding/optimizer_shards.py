"""The distributed optimizer's state, of which each data parallel rank saves and loads its own part.

Megatron's form that any layout can load ("fully_reshardable") gathers the state of all data
parallel ranks on each of them before a save: 12 bytes a parameter, for which training waits. But a
rank's part of a parameter is a range of its elements, a range is a few rectangles, and rectangles
are what torch's checkpoints store. So nothing is gathered, and every rank writes its own part. The
checkpoint holds the same tensors under the same names: each form can load checkpoints of the other.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_sorted.checkpoint.sharding.rectangles import rectangles_of_range

PREFIX = "optimizer.state"  # Megatron's


def parts_of(optimizer) -> list:
    """Return the optimizers in Megatron's ``optimizer``: those that it chains, or itself."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def states_of_parts(optimizer, state: dict[Any, Any]) -> list[dict[str, Any]]:
    """Return the state of each part of ``optimizer``; a single part's state is not numbered."""
    count = len(parts_of(optimizer))
    return [state] if count == 1 else [state[index] for index in range(count)]


def only_part(optimizer) -> DistributedOptimizer | None:
    """Return ``optimizer`` as a single distributed optimizer; None if it is of another kind."""
    parts = parts_of(optimizer)
    return parts[0] if len(parts) == 1 and isinstance(parts[0], DistributedOptimizer) else None


def _whole_tensors(
    base: ShardedTensor | ShardedTensorFactory,
) -> Iterator[tuple[int, ShardedTensor]]:
    """Yield (first element within the parameter, sharded tensor) for each tensor of a parameter.

    A parameter is saved as one tensor, or as several, cut along dimension 0.
    """
    if isinstance(base, ShardedTensor):
        yield 0, base
        return
    first = 0
    for part in nested_values(base.build()):
        # the two halves of a gated MLP; parameters cut in another manner are not supported
        assert part.data.storage_offset() == base.data.storage_offset() + first, (
            f"{part.key}: not a run of whole rows"
        )
        yield first, part
        first += part.data.numel()
    assert first == base.data.numel(), f"{base.key}: parts and parameter differ in size"


def own_rectangles(
    base: ShardedTensor | ShardedTensorFactory, start: int, end: int, is_replicated: bool = False
) -> Iterator[tuple[int, ShardedTensor]]:
    """Yield (first element within the range, sharded tensor without data) for each rectangle.

    The range is elements ``start``..``end`` - 1 of the parameter. With ``is_replicated`` all data
    parallel ranks hold it, and one of them saves it.
    """
    for first, whole in _whole_tensors(base):
        inside = rectangles_of_range(
            whole.local_shape, max(start - first, 0), min(end - first, whole.data.numel())
        )
        # layers are saved as one tensor with the layer as first dimension
        stacked = whole.prepend_axis_num
        for rectangle in inside:
            corners = zip(whole.global_offset, (0,) * stacked + rectangle.offset, strict=True)
            yield (
                first + rectangle.first - start,
                replace(
                    whole,
                    data=None,
                    dtype=torch.float32,
                    local_shape=(1,) * stacked + rectangle.shape,
                    global_offset=tuple(outer + inner for outer, inner in corners),
                    axis_fragmentations=None,
                    # where data parallel ranks hold different parts, none is a replica
                    replica_id=whole.replica_id if is_replicated else (*whole.replica_id[:-1], 0),
                    prepend_axis_num=0,
                ),
            )


def state_of_parts(
    optimizer: DistributedOptimizer, model_state: dict[str, Any], with_data: bool
) -> dict[str, Any]:
    """Return the state of this rank's parts of parameters as sharded tensors.

    Args:
        optimizer: The optimizer, which has state.
        model_state: The model's sharded state dict, for names and positions.
        with_data: True for saving; for loading, tensors are allocated when they are read.
    """
    bases = {
        id(base.data): base
        for base in nested_values(model_state)
        if isinstance(base, ShardedTensor | ShardedTensorFactory)
    }
    result = {}
    for index, parameter in enumerate(optimizer.model_param_group_index_map):
        within = optimizer._get_model_param_range_map(parameter)["param"]
        state = optimizer._get_main_param_and_optimizer_states(parameter)
        rectangles = list(own_rectangles(bases[id(parameter)], within.start, within.end))
        moments = {name: flat for name, flat in state.items() if name != "step"}
        result[index] = named_rectangles(moments, rectangles, with_data)
    return result


def named_rectangles(
    state: Mapping[str, torch.Tensor], rectangles: list[tuple[int, ShardedTensor]], with_data: bool
) -> dict[str, dict[int, ShardedTensor]]:
    """Return an optimizer's state of a parameter's part as rectangles, under Megatron's names."""
    return {
        name: {
            first: replace(
                sharded,
                key=f"{PREFIX}.{name}.{sharded.key}",
                data=rectangle_of(flat, first, sharded) if with_data else None,
            )
            for first, sharded in rectangles
        }
        for name, flat in state.items()
    }


def rectangle_of(part: torch.Tensor, first: int, sharded: ShardedTensor) -> torch.Tensor:
    """Return a view of a rectangle of a parameter's part, which begins at element ``first``.

    ``sharded`` gives the rectangle's shape.
    """
    last = first + torch.Size(sharded.local_shape).numel()
    return part.detach().view(-1)[first:last].view(sharded.local_shape)


def take_state_of_parts(optimizer: DistributedOptimizer, loaded: dict[str, Any]) -> None:
    """Copy loaded tensors, requested by ``state_of_parts``, into the optimizer."""
    for index, parameter in enumerate(optimizer.model_param_group_index_map):
        state = optimizer._get_main_param_and_optimizer_states(parameter)
        for name, rectangles in loaded[index].items():
            for first, tensor in rectangles.items():
                state[name].detach()[first : first + tensor.numel()].copy_(tensor.reshape(-1))
