"""The distributed optimizer's state, each data parallel rank writing and reading its own part.

Megatron's form that survives every change of layout ("fully_reshardable") gathers the state of all data parallel ranks on each of them
before a save: 12 bytes a parameter, for which training waits. A rank's part of a parameter is a range of its elements, and a range is a
few rectangles, of which torch's checkpoints are made anyway. So nothing is gathered, every rank writes its own part, and the checkpoint
holds the same tensors under the same names: either side can load what the other has saved.
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
    """Return the optimizers that Megatron's ``optimizer`` consists of: those it chains, or itself."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def only_part(optimizer) -> DistributedOptimizer | None:
    """Return the distributed optimizer that ``optimizer`` consists of, or None if it is of another kind or of several parts."""
    parts = parts_of(optimizer)
    return parts[0] if len(parts) == 1 and isinstance(parts[0], DistributedOptimizer) else None


def _whole_tensors(
    base: ShardedTensor | ShardedTensorFactory,
) -> Iterator[tuple[int, ShardedTensor]]:
    """Yield (first element within the parameter, sharded tensor) of what a parameter is saved as: itself, or its parts along dim 0."""
    if isinstance(base, ShardedTensor):
        yield 0, base
        return
    first = 0
    for part in nested_values(base.build()):
        # the two halves of a gated MLP; whatever is cut or turned otherwise is not known here
        assert part.data.storage_offset() == base.data.storage_offset() + first, (
            f"{part.key}: not a run of whole rows"
        )
        yield first, part
        first += part.data.numel()
    assert first == base.data.numel(), f"{base.key}: parts and parameter differ in size"


def own_rectangles(
    base: ShardedTensor | ShardedTensorFactory, start: int, end: int
) -> Iterator[tuple[int, ShardedTensor]]:
    """Yield (first element within the range, sharded tensor without data) of each rectangle of elements ``start``..``end`` - 1."""
    for first, whole in _whole_tensors(base):
        inside = rectangles_of_range(
            whole.local_shape, max(start - first, 0), min(end - first, whole.data.numel())
        )
        for box in inside:
            stacked = (
                whole.prepend_axis_num
            )  # layers are saved as one tensor with the layer as first dimension
            offset = tuple(
                at + more
                for at, more in zip(whole.global_offset, (0,) * stacked + box.offset, strict=True)
            )
            # each data parallel rank has a part of its own, so none is a copy of another's
            yield (
                first + box.first - start,
                replace(
                    whole,
                    data=None,
                    dtype=torch.float32,
                    local_shape=(1,) * stacked + box.shape,
                    global_offset=offset,
                    axis_fragmentations=None,
                    replica_id=(*whole.replica_id[:-1], 0),
                    prepend_axis_num=0,
                ),
            )


def state_of_parts(
    optimizer: DistributedOptimizer, model_state: dict[str, Any], with_data: bool
) -> dict[str, Any]:
    """Return the state of this rank's parts of parameters as sharded tensors, for a sharded state dict.

    Args:
        optimizer: With state.
        model_state: The model's sharded state dict, for names and places.
        with_data: True for saving; for loading, tensors are made when they are read.
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
        kept = {name: flat for name, flat in state.items() if name != "step"}
        result[index] = named_rectangles(kept, rectangles, with_data)
    return result


def named_rectangles(
    state: Mapping[str, torch.Tensor], rectangles: list[tuple[int, ShardedTensor]], with_data: bool
) -> dict[str, dict[int, ShardedTensor]]:
    """Return what an optimizer keeps of a parameter's part, as rectangles under Megatron's names."""
    return {
        name: {
            first: replace(
                box,
                key=f"{PREFIX}.{name}.{box.key}",
                data=rectangle_of(flat, first, box) if with_data else None,
            )
            for first, box in rectangles
        }
        for name, flat in state.items()
    }


def rectangle_of(part: torch.Tensor, first: int, box: ShardedTensor) -> torch.Tensor:
    """Return a view of a rectangle of a rank's part of a parameter, from element ``first`` on."""
    last = first + torch.Size(box.local_shape).numel()
    return part.detach().view(-1)[first:last].view(box.local_shape)


def take_state_of_parts(optimizer: DistributedOptimizer, loaded: dict[str, Any]) -> None:
    """Copy what was loaded for ``state_of_parts`` into the optimizer."""
    for index, parameter in enumerate(optimizer.model_param_group_index_map):
        state = optimizer._get_main_param_and_optimizer_states(parameter)
        for name, rectangles in loaded[index].items():
            for first, tensor in rectangles.items():
                state[name].detach()[first : first + tensor.numel()].copy_(tensor.reshape(-1))
