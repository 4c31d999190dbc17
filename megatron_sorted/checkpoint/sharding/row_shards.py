"""Checkpoints of fully sharded networks (``parallel.fsdp``): each rank saves and loads its rows.

They hold the same tensors under the same names as those of any other layout with the distributed
optimizer, so each layout can load checkpoints of the other.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_sorted.checkpoint.sharding.optimizer_shards import (
    named_rectangles,
    own_rectangles,
    parts_of,
    rectangle_of,
)
from megatron_sorted.checkpoint.sharding.optimizer_state import fill_empty_state

ADAM = ("exp_avg", "exp_avg_sq")
Rows = dict[str, dict[int, ShardedTensor]]
"""{name of a parameter: {first element within this rank's rows: sharded tensor}}."""


def keeps_rows(chunk: torch.nn.Module) -> bool:
    """Return whether a wrapped model is sharded by rows."""
    return hasattr(chunk, "row_shards")


def rectangles_of_rows(chunk: Any) -> Iterator[tuple[Any, list[tuple[int, ShardedTensor]]]]:
    """Yield each parameter's rows with their rectangles of the whole tensors."""
    for shard in chunk.row_shards:
        start = shard.first_row * shard.sharded.shape[1:].numel()
        end = start + shard.rows.numel()
        yield shard, list(own_rectangles(chunk.states[shard.name], start, end))


def row_states(chunk: Any, with_data: bool) -> dict[str, Any]:
    """Return the model's sharded state dict: this rank's rows, and objects that are not tensors.

    Args:
        chunk: The model.
        with_data: True for saving: weights in the precision that layers use. For loading, tensors
            are allocated when they are read.
    """
    states = {
        name: state
        for name, state in chunk.states.items()
        if not isinstance(state, ShardedTensor | ShardedTensorFactory)
    }
    for shard, rectangles in rectangles_of_rows(chunk):
        dtype = chunk.states[shard.name].data.dtype
        states[shard.name] = {
            first: replace(
                sharded,
                dtype=dtype,
                data=rectangle_of(shard.rows, first, sharded).to(dtype) if with_data else None,
            )
            for first, sharded in rectangles
        }
    return states


def views_of_rows(chunk: Any) -> Rows:
    """Return this rank's rows in Megatron's form for stacked layers, with views as data."""
    states: Rows = {}
    for shard, rectangles in rectangles_of_rows(chunk):
        states[shard.name] = {}
        for first, sharded in rectangles:
            # 1 where layers are stacked in a dimension before those of the parameter, else 0
            stacked = len(sharded.local_shape) - shard.rows.dim()
            shape = sharded.local_shape[stacked:]
            states[shard.name][first] = replace(
                sharded,
                local_shape=shape,
                prepend_axis_num=stacked,
                dtype=shard.rows.dtype,
                data=rectangle_of(shard.rows, first, sharded).view(shape),
            )
    return states


def take_rows(chunk: Any, loaded: Rows) -> None:
    """Copy loaded tensors, requested by ``row_states``, into the weights."""
    for shard, rectangles in rectangles_of_rows(chunk):
        for first, sharded in rectangles:
            rectangle_of(shard.rows, first, sharded).copy_(loaded[shard.name][first])


def _states_of(optimizer: Any, shard: Any) -> dict[str, torch.Tensor]:
    """Return {the distributed optimizer's name: tensor} of a parameter's rows and moments."""
    return {"param": shard.rows, **{name: optimizer.state[shard.rows][name] for name in ADAM}}


def optimizer_rows(optimizer: Any, chunk: Any, steps: int, with_data: bool) -> dict[str, Any]:
    """Return the optimizer's sharded state dict, in the form of the distributed optimizer.

    Args:
        optimizer: Megatron's optimizer; before its first step it is given an initial state.
        chunk: The model.
        steps: Number of steps that it has taken.
        with_data: Whether to save, as for ``row_states``.
    """
    (part,) = parts_of(optimizer)
    fill_empty_state(part)
    if not part.optimizer.state:  # a fused Adam, which ``fill_empty_state`` leaves alone
        part.init_state_fn(part.optimizer, part.config)
    groups = [
        {key: value for key, value in group.items() if key != "params"} | {"step": steps}
        for group in part.optimizer.param_groups
    ]
    state: dict[str, Any] = {"optimizer": {"param_groups": groups}, "parts": {}}
    if getattr(part, "grad_scaler", None):
        state["grad_scaler"] = part.grad_scaler.state_dict()
    for index, (shard, rectangles) in enumerate(rectangles_of_rows(chunk)):
        moments = _states_of(part.optimizer, shard)
        state["parts"][index] = named_rectangles(moments, rectangles, with_data)
    return state


def take_optimizer_rows(optimizer: Any, chunk: Any, loaded: dict[str, Any]) -> None:
    """Copy loaded tensors, requested by ``optimizer_rows``, into the optimizer.

    Its fp32 weights are the model's rows.
    """
    (part,) = parts_of(optimizer)
    inner = part.optimizer
    groups = loaded["optimizer"]["param_groups"]
    for group, saved in zip(inner.param_groups, groups, strict=True):
        # fused Adams count steps in the group
        group.update({key: value for key, value in saved.items() if key in group})
        for rows in group["params"]:
            if "step" in inner.state[rows]:
                inner.state[rows]["step"].fill_(float(saved["step"]))
    if getattr(part, "grad_scaler", None) and "grad_scaler" in loaded:
        part.grad_scaler.load_state_dict(loaded["grad_scaler"])
    for index, (shard, rectangles) in enumerate(rectangles_of_rows(chunk)):
        for name, rows in _states_of(inner, shard).items():
            for first, sharded in rectangles:
                rectangle_of(rows, first, sharded).copy_(loaded["parts"][index][name][first])
