"""Content of a checkpoint as Megatron's sharded state dict, and loading it.

Each tensor has one global name, whatever the layout.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sorted.checkpoint.layout import AVERAGED
from megatron_sorted.checkpoint.manifest import CONTENT, WEIGHTS_ONLY, find_damage
from megatron_sorted.checkpoint.plain_objects import check_checkpoint_is_safe
from megatron_sorted.checkpoint.sharding.main_weights import (
    main_weights,
    states_like_weights,
    take_states,
)
from megatron_sorted.checkpoint.sharding.optimizer_shards import (
    only_part,
    parts_of,
    state_of_parts,
    states_of_parts,
)
from megatron_sorted.checkpoint.sharding.optimizer_state import (
    complete_empty_state,
    fill_empty_state,
    load_optimizer_state,
    state_dict_with_steps,
    steps_taken,
)
from megatron_sorted.checkpoint.sharding.row_shards import (
    keeps_rows,
    optimizer_rows,
    row_states,
    take_optimizer_rows,
    take_rows,
    views_of_rows,
)
from megatron_sorted.errors import CheckpointError
from megatron_sorted.parallel.groups import process_groups
from megatron_sorted.platform.state import random_state, set_random_state
from megatron_sorted.platform.versions import known_arguments
from megatron_sorted.settings.lora import is_adapter


def inner(chunk: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside Megatron's wrappers, whose parameters have no "module." prefix."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def weights_in_place(chunk: torch.nn.Module) -> dict[str, Any]:
    """Return the sharded state dict of this rank's weights; its data are the weights or views."""
    return (
        views_of_rows(chunk)
        if keeps_rows(chunk)
        else inner(chunk).sharded_state_dict(metadata=dict(CONTENT))
    )


def _by_name(chunks: list) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield (name of its state, chunk) for each chunk."""
    for index, chunk in enumerate(chunks):
        yield f"model{index}" if len(chunks) > 1 else "model", chunk


def _model_states(chunks: list, is_loading: bool) -> dict[str, Any]:
    if keeps_rows(chunks[0]):
        return {"model": row_states(chunks[0], with_data=not is_loading)}
    return {name: weights_in_place(chunk) for name, chunk in _by_name(chunks)}


def random_place() -> list[int]:
    """Return the sizes of pipeline and tensor parallel groups, on which random numbers depend."""
    groups = process_groups()
    return [groups.pp.size(), groups.tp.size()]


def _random_object(state: Any) -> ShardedObject:
    """Return the random state as an object of this rank's place in the layout.

    Data parallel ranks draw the same numbers, so the first one writes, and their number may change.
    """
    groups = process_groups()
    place, replica = (groups.pp.rank(), groups.tp.rank()), groups.dp_cp.rank()
    return ShardedObject("random_state", state, tuple(random_place()), place, replica_id=replica)


def optimizer_state(optimizer, model_state: dict[str, Any], is_loading: bool) -> dict[str, Any]:
    """Return the optimizer's sharded state dict.

    Collective: one all-reduce of a number over all ranks; an optimizer of several parts (experts)
        also gathers over data parallel groups.
    """
    part, steps = only_part(optimizer), steps_taken(optimizer)
    if part is None:
        parts = parts_of(optimizer)
        state = optimizer.sharded_state_dict(
            model_state, is_loading=is_loading, metadata=dict(CONTENT)
        )
        for one, own in zip(parts, states_of_parts(optimizer, state), strict=True):
            if len(parts) == 1 or not isinstance(one, DistributedOptimizer):
                complete_empty_state(one, own, steps)
        return state
    if hasattr(optimizer, "_synchronize_steps"):
        optimizer._synchronize_steps()
    return {
        **state_dict_with_steps(part, steps),
        "parts": state_of_parts(part, model_state, with_data=not is_loading),
    }


def _optimizer_of(
    chunks: list, optimizer, states: dict[str, Any], is_loading: bool
) -> dict[str, Any]:
    """Return the optimizer's sharded state dict.

    Collective: one all-reduce of a number over all ranks, and those of ``optimizer_state``.
    """
    if keeps_rows(chunks[0]):
        steps = steps_taken(optimizer)
        return optimizer_rows(optimizer, chunks[0], steps, with_data=not is_loading)
    # a single chunk's state, since Megatron looks parameters up by name
    return optimizer_state(optimizer, states.get("model", states), is_loading)


def _averages(
    tensors: list[torch.Tensor] | None, chunks: list, optimizer, states: dict[str, Any]
) -> dict[str, Any]:
    """Return the entry of averaged weights of a sharded state dict; none without ``tensors``."""
    if tensors is None:
        return {}
    weights = main_weights(optimizer)
    return {AVERAGED: states_like_weights(AVERAGED, tensors, chunks, weights, states)}


def sharded_state(
    chunks: list,
    optimizer,
    schedule,
    more: dict[str, Any],
    averages: list[torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Return the whole state of a checkpoint, for ``Saver.save``.

    Collective: with overlapped gathering the parameters are gathered first (data parallel group);
        then those of ``optimizer_state``.

    Args:
        chunks: This rank's model chunks.
        optimizer: Megatron's optimizer.
        schedule: Megatron's learning-rate schedule.
        more: Further small state, the same on all ranks, such as a coefficient rule's.
        averages: The averages of this rank's weights (``main_weights``), if there are any.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            # otherwise each rank would save its own shard updated and the others' from before
            chunk.start_param_sync(force_sync=True)
    states = _model_states(chunks, is_loading=False)
    return {
        **states,
        "optimizer": _optimizer_of(chunks, optimizer, states, is_loading=False),
        **_averages(averages, chunks, optimizer, states),
        "opt_param_scheduler": schedule.state_dict(),
        "random_state": _random_object(
            {"python": random.getstate(), "numpy": np.random.get_state(), **random_state()}
        ),
        "more": more,
        "content_metadata": dict(CONTENT),
    }


def _take_out(states: dict[str, Any], is_taken: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
    """Remove the names for which ``is_taken`` from ``states``; return {model: {name: state}}."""
    return {
        model: {name: state.pop(name) for name in list(state) if is_taken(name)}
        for model, state in states.items()
    }


def _take_unsaved(states: dict[str, Any], manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Remove the states that the checkpoint lacks from ``states``; return {model: {name: value}}.

    A checkpoint of weights alone lacks the extra state of layers, which start without it if they
    are given None. Adapters that a run adds to a network without them keep their initial values.

    Args:
        states: {model: sharded state dict}.
        manifest: The checkpoint's manifest.
    """
    weights_only = manifest.get("contents") == WEIGHTS_ONLY
    extra = _take_out(states, lambda name: weights_only and name.endswith("_extra_state"))
    has_adapters = manifest.get("settings", {}).get("lora_rank")
    new = _take_out(states, lambda name: not has_adapters and is_adapter(name))
    return {
        model: dict.fromkeys(extra[model]) | {name: value.data for name, value in state.items()}
        for model, state in new.items()
    }


def load_sharded(
    directory: Path,
    manifest: Mapping[str, Any],
    chunks: list,
    optimizer,
    load_optimizer: bool,
    load_random: bool,
    averages: list[torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Load weights and, if requested, optimizer and random state; return the further state.

    The result holds "more", the learning-rate schedule's "opt_param_scheduler" (both empty where
    the checkpoint holds weights only), and under "random_state" whether that was loaded. Weights
    are converted to the run's dtype. With ``averages`` the averages of this rank's weights are
    loaded into these tensors.

    Collective: every rank must call it; each reads the shards that it needs.

    Raises:
        CheckpointError: The checkpoint cannot be loaded into this model, or loading it would run
            foreign code.
    """
    check_checkpoint_is_safe(directory)
    fill_empty_state(optimizer)
    states = _model_states(chunks, is_loading=True)
    unsaved = _take_unsaved(states, manifest)
    wanted: dict[str, Any] = dict(states)
    if load_optimizer:
        wanted["optimizer"] = _optimizer_of(chunks, optimizer, states, is_loading=True)
    wanted |= _averages(averages, chunks, optimizer, states)
    same_place = load_random and manifest.get("layout", {}).get("random_place") == random_place()
    if same_place:
        wanted["random_state"] = _random_object(None)
    try:
        loaded = dist_checkpointing.load(
            wanted,
            str(directory),
            **known_arguments(dist_checkpointing.load, process_group=dist.group.WORLD),
        )
    except (Exception, CheckpointException) as error:
        # torch's CheckpointException is no Exception; damaged files raise errors of many kinds
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise CheckpointError(
            f"{directory}: could not be loaded ({reason}). "
            "If files were lost or damaged, load an earlier checkpoint with --ckpt-step."
        ) from error
    for name, chunk in _by_name(chunks):
        if keeps_rows(chunk):
            take_rows(chunk, loaded[name])
        else:
            inner(chunk).load_state_dict({**loaded[name], **unsaved[name]})
    if load_optimizer and keeps_rows(chunks[0]):
        take_optimizer_rows(optimizer, chunks[0], loaded["optimizer"])
    elif load_optimizer:
        load_optimizer_state(optimizer, loaded["optimizer"])
    elif hasattr(optimizer, "reload_model_params"):
        optimizer.reload_model_params()
    if averages is not None:
        take_states(averages, loaded[AVERAGED])
    if same_place:
        state = loaded["random_state"]
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        set_random_state(state)
    return {
        "more": loaded.get("more", {}),
        "opt_param_scheduler": loaded.get("opt_param_scheduler", {}),
        "random_state": same_place,
    }


def find_damage_on_all_ranks(
    directory: Path, manifest: Mapping[str, Any], shards_too: bool = True
) -> list[str]:
    """Return a sentence for each damaged file of a checkpoint, the same on all ranks.

    Each rank reads its share of the bytes.

    Collective: one all-gather of sentences over all ranks.

    Args:
        directory: The checkpoint.
        manifest: The checkpoint's manifest.
        shards_too: Whether to read weights and moments too, or the small files alone.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    load, mine = [0] * world_size, []
    sizes = {
        name: record["bytes"]
        for name, record in manifest["files"].items()
        if shards_too or not name.endswith(".distcp")
    }
    for name in sorted(sizes, key=sizes.get, reverse=True):
        lightest = load.index(min(load))
        load[lightest] += sizes[name]
        if lightest == rank:
            mine.append(name)
    problems: list[list[str]] = [[]] * world_size
    damage = find_damage(directory, manifest, mine)
    dist.all_gather_object(problems, damage, group=dist.group.WORLD)
    return [problem for of_rank in problems for problem in of_rank]
