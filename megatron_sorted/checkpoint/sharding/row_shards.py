"""Checkpoints of a network whose ranks keep rows of every parameter (``parallel.fsdp``): each rank writes and reads its rows.

They hold the same tensors under the same names as those of any other layout with the distributed optimizer, so either side can load what
the other has saved.
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


def _rectangles(chunk: Any) -> Iterator[tuple[Any, list[tuple[int, ShardedTensor]]]]:
    """Yield each parameter's rows with the rectangles of whole tensors that they are."""
    for shard in chunk.row_shards:
        row = shard.sharded.shape[1:].numel()
        start = shard.first_row * row
        yield (
            shard,
            list(own_rectangles(chunk.states[shard.name], start, start + shard.rows.numel())),
        )


def row_states(chunk: Any, with_data: bool) -> dict[str, Any]:
    """Return the model's sharded state dict: this rank's rows, and objects that are no tensors as they were.

    Args:
        chunk: The model.
        with_data: True for saving: weights in the precision that layers see. For loading, tensors are made when they are read.
    """
    states = {
        name: state
        for name, state in chunk.states.items()
        if not isinstance(state, ShardedTensor | ShardedTensorFactory)
    }
    for shard, rectangles in _rectangles(chunk):
        dtype = chunk.states[shard.name].data.dtype
        states[shard.name] = {
            first: replace(
                box,
                dtype=dtype,
                data=rectangle_of(shard.rows, first, box).to(dtype) if with_data else None,
            )
            for first, box in rectangles
        }
    return states


def views_of_rows(chunk: Any) -> Rows:
    """Return this rank's rows as Megatron describes tensors that layers are stacked in, with views of the weights as data."""
    states: Rows = {}
    for shard, rectangles in _rectangles(chunk):
        states[shard.name] = {}
        for first, box in rectangles:
            stacked = (
                len(box.local_shape) - shard.rows.dim()
            )  # the dimension in which layers are stacked
            shape = box.local_shape[stacked:]
            states[shard.name][first] = replace(
                box,
                local_shape=shape,
                prepend_axis_num=stacked,
                dtype=shard.rows.dtype,
                data=rectangle_of(shard.rows, first, box).view(shape),
            )
    return states


def take_rows(chunk: Any, loaded: Rows) -> None:
    """Copy what was loaded for ``row_states`` into the weights."""
    for shard, rectangles in _rectangles(chunk):
        for first, box in rectangles:
            rectangle_of(shard.rows, first, box).copy_(loaded[shard.name][first])


def _states_of(optimizer: Any, shard: Any) -> dict[str, torch.Tensor]:
    """Return what the optimizer keeps of a parameter's rows, by the distributed optimizer's names."""
    return {"param": shard.rows, **{name: optimizer.state[shard.rows][name] for name in ADAM}}


def optimizer_rows(optimizer: Any, chunk: Any, steps: int, with_data: bool) -> dict[str, Any]:
    """Return the optimizer's sharded state dict, in the form of the distributed optimizer.

    Args:
        optimizer: Megatron's; one that has not stepped yet is given a first state.
        chunk: The model.
        steps: That it has made.
        with_data: As for ``row_states``.
    """
    (part,) = parts_of(optimizer)
    fill_empty_state(part)
    if not part.optimizer.state:  # of a fused Adam
        part.init_state_fn(part.optimizer, part.config)
    groups = [
        {key: value for key, value in group.items() if key != "params"} | {"step": steps}
        for group in part.optimizer.param_groups
    ]
    state: dict[str, Any] = {"optimizer": {"param_groups": groups}, "parts": {}}
    if getattr(part, "grad_scaler", None):
        state["grad_scaler"] = part.grad_scaler.state_dict()
    for index, (shard, rectangles) in enumerate(_rectangles(chunk)):
        state["parts"][index] = named_rectangles(
            _states_of(part.optimizer, shard), rectangles, with_data
        )
    return state


def take_optimizer_rows(optimizer: Any, chunk: Any, loaded: dict[str, Any]) -> None:
    """Copy what was loaded for ``optimizer_rows`` into the optimizer, and its fp32 weights into the model."""
    (part,) = parts_of(optimizer)
    inner = part.optimizer
    saved = loaded["optimizer"]["param_groups"]
    for group, said in zip(inner.param_groups, saved, strict=True):
        group.update(
            {key: value for key, value in said.items() if key in group}
        )  # fused Adams count steps in the group
        for rows in group["params"]:
            if "step" in inner.state[rows]:
                inner.state[rows]["step"].fill_(float(said["step"]))
    if getattr(part, "grad_scaler", None) and "grad_scaler" in loaded:
        part.grad_scaler.load_state_dict(loaded["grad_scaler"])
    for index, (shard, rectangles) in enumerate(_rectangles(chunk)):
        for name, rows in _states_of(inner, shard).items():
            for first, box in rectangles:
                rectangle_of(rows, first, box).copy_(loaded["parts"][index][name][first])
