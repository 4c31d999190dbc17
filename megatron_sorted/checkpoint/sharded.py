"""Saving and loading through Megatron's torch_dist format: one global name per tensor, whatever the layout."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_sorted.checkpoint.layout import DESCRIPTION, TRACKER, Progress, iteration_directory, read_description, write_text_atomically
from megatron_sorted.checkpoint.optimizer_state import fill_empty_state, load_optimizer_state
from megatron_sorted.errors import CheckpointError
from megatron_sorted.platform.state import random_state, set_random_state

# The form of the distributed optimizer's state that survives a change of layout.
CONTENT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True, "singleton_local_shards": False}


def _inner(chunk: torch.nn.Module) -> torch.nn.Module:
    """Returns the module inside Megatron's wrappers, whose names carry no "module." prefix."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _model_states(chunks: list) -> dict[str, Any]:
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    return {name: _inner(chunk).sharded_state_dict(metadata=dict(CONTENT)) for name, chunk in zip(names, chunks, strict=True)}


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(), "numpy": np.random.get_state(), **random_state(),
    }


def _groups() -> tuple[dist.ProcessGroup, ...]:
    return (
        parallel_state.get_pipeline_model_parallel_group(), parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True))


def _layout() -> list[int]:
    """Returns the sizes of pipeline, tensor and data parallel groups."""
    return [group.size() for group in _groups()]


def _random_object(state: Any) -> ShardedObject:
    """Returns the random state as an object of this place in the layout; it can be loaded only in the same layout."""
    return ShardedObject("random_state", state, tuple(_layout()), tuple(group.rank() for group in _groups()), replica_id=0)


def save_checkpoint(root: str, chunks: list, optimizer, schedule, progress: Progress, description: dict[str, Any],
                    more_state: dict[str, Any]) -> Path:
    """Returns the directory of the new checkpoint. It is written aside and named in the tracker only when complete.

    Collective: every rank writes its shards; barriers over all ranks.

    Args:
        root: Directory of all checkpoints of the run.
        chunks: This rank's model chunks.
        optimizer: Megatron's optimizer.
        schedule: Megatron's learning-rate schedule.
        progress: How far training is.
        description: What ``run.json`` holds besides progress; plain data.
        more_state: Further small state, the same on all ranks (such as a coefficient rule's).
    """
    final = iteration_directory(root, progress.step)
    aside = final.with_name(f".{final.name}.writing")
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    states = _model_states(chunks)
    state = {
        **states,
        "optimizer": optimizer.sharded_state_dict(_merged(states), metadata=dict(CONTENT)),
        "opt_param_scheduler": schedule.state_dict(),
        "random_state": _random_object(_random_state()),
        "iteration": progress.step,
        "consumed_train_samples": progress.samples,
        "more": more_state,
    }
    dist_checkpointing.save(state, str(aside), content_metadata=dict(CONTENT))
    dist.barrier()
    if dist.get_rank() == 0:
        text = json.dumps({**description, "layout": _layout(), "progress": {"step": progress.step, "samples": progress.samples}}, indent=1)
        write_text_atomically(aside / DESCRIPTION, text)
        if final.exists():  # the same step saved again, by a run continued from an earlier checkpoint
            shutil.rmtree(final)
        aside.rename(final)
        write_text_atomically(Path(root) / TRACKER, str(progress.step))
    dist.barrier()
    return final


def _merged(states: dict[str, Any]) -> dict[str, Any]:
    """Returns the state dict the optimizer looks parameters up in: a single chunk's, or all chunks' by name."""
    return states.get("model", states)


def load_checkpoint(directory: Path, chunks: list, optimizer, schedule, load_optimizer: bool,
                    load_random: bool) -> tuple[Progress, dict[str, Any]]:
    """Returns progress and further state after loading weights and, if asked for, optimizer, schedule and random state.

    Collective: every rank reads the shards it needs.

    Raises:
        CheckpointError: The checkpoint cannot be read into this model.
    """
    fill_empty_state(optimizer)
    states = _model_states(chunks)
    wanted: dict[str, Any] = dict(states)
    if load_optimizer:
        wanted["optimizer"] = optimizer.sharded_state_dict(_merged(states), is_loading=True, metadata=dict(CONTENT))
    same_layout = load_random and read_description(directory)["layout"] == _layout()
    if same_layout:
        wanted["random_state"] = _random_object(None)
    try:
        loaded = dist_checkpointing.load(wanted, str(directory))
    except Exception as error:  # a damaged shard shows as anything from KeyError to a collective's own error
        raise CheckpointError(f"{directory}: could not be loaded ({type(error).__name__}: {error}). "
                              "If files were lost or damaged, load an earlier checkpoint.") from error
    for index, chunk in enumerate(chunks):
        _inner(chunk).load_state_dict(loaded["model" if len(chunks) == 1 else f"model{index}"])
    if load_optimizer:
        load_optimizer_state(optimizer, loaded["optimizer"])
        schedule.load_state_dict(loaded["opt_param_scheduler"])
    elif hasattr(optimizer, "reload_model_params"):
        optimizer.reload_model_params()
    if same_layout:
        _set_random_state(loaded["random_state"])
    progress = read_description(directory)["progress"]
    return Progress(progress["step"], progress["samples"]), loaded.get("more", {})


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    set_random_state(state)
