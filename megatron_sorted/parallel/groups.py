"""Start and end of the process groups, and this process's place in the layout."""

import os
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sorted.parallel.rendezvous import has_shared_store, meet
from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.processes import read_world_of_training
from megatron_sorted.settings.layout import num_virtual_chunks
from megatron_sorted.settings.run import Settings


@dataclass(frozen=True)
class Place:
    """This process's place in the layout.

    Attributes:
        rank, world_size: Rank among all processes, and their number.
        stage, num_stages: Pipeline stage, and the number of stages.
        data_rank, data_size: Rank among data parallel processes, and their number.
        tensor_rank: Rank among tensor parallel processes.
    """

    rank: int
    world_size: int
    stage: int
    num_stages: int
    data_rank: int
    data_size: int
    tensor_rank: int


def start_process_groups(
    settings: Settings, platform: Platform, init_method: str | None = None
) -> Place:
    """Create the process groups; return this process's place.

    Collective: creates the world group and all of Megatron's groups; every process must call it.

    Args:
        settings: The run's settings.
        platform: Platform of the run.
        init_method: torch.distributed's address of the rendezvous; by default that of the
            launcher's environment.
    """
    world = read_world_of_training(os.environ)
    rank, world_size = world.rank, world.size
    platform.select_device(world.local_rank)
    backend = (
        platform.backend if settings.distributed_backend == "auto" else settings.distributed_backend
    )
    if init_method is None and "MASTER_ADDR" not in os.environ:
        # a single process started without a launcher: any free port of this host
        init_method = "tcp://127.0.0.1:0"
    timeout = timedelta(minutes=settings.distributed_timeout_minutes)
    if not dist.is_initialized():
        if init_method is None and has_shared_store():
            store, rank, world_size = meet(timeout)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=timeout
            )
        else:
            dist.init_process_group(
                backend, init_method=init_method, rank=rank, world_size=world_size, timeout=timeout
            )
    chunks = num_virtual_chunks(settings)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=settings.tensor_model_parallel_size,
        pipeline_model_parallel_size=settings.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=settings.context_parallel_size,
        expert_model_parallel_size=settings.expert_model_parallel_size,
        distributed_timeout_minutes=settings.distributed_timeout_minutes,
        create_gloo_process_groups=False,  # the device's own groups are enough
    )
    process_groups.cache_clear()  # a process may start groups again
    return current_place()


@cache
def process_groups() -> ProcessGroupCollection:
    """Return Megatron's process groups, which every function of Megatron's is given explicitly.

    A group that is left out is, in some functions and versions, the group of all processes instead
    of the right one. tests/rules/test_process_groups.py finds calls that leave one out.
    """
    return ProcessGroupCollection.use_mpu_process_groups()


def current_place() -> Place:
    """Return this process's place in the groups that exist."""
    groups = process_groups()
    return Place(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        stage=groups.pp.rank(),
        num_stages=groups.pp.size(),
        data_rank=groups.dp.rank(),
        data_size=groups.dp.size(),
        tensor_rank=groups.tp.rank(),
    )


def stop_process_groups() -> None:
    """Leave all groups.

    Collective: every process must call it.
    """
    process_groups.cache_clear()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
