"""This process's rank in its job, from the variables that torchrun or srun set.

It also holds what must be set before torch is imported. The trainer and the doctor use it; it needs
the standard library alone.
"""

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_sorted.errors import PlatformError

OTHER_LAUNCHERS = {
    "srun": ("SLURM_PROCID", "SLURM_NTASKS"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE"),
}
"""{launcher: the variables that hold a task's number and the number of tasks}."""


@dataclass(frozen=True)
class World:
    """This process's place among all processes of its job.

    Attributes:
        rank: Rank of this process.
        size: Number of processes.
        local_rank: Rank of this process on its node.
        local_size: Number of processes on this node.
        node: Number of this node.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0

    @property
    def num_nodes(self) -> int:
        """Return the number of nodes, assuming that all have as many processes as this one."""
        return -(-self.size // self.local_size)


def read_world(environment: Mapping[str, str]) -> World:
    """Return the place of this process; the only process if no launcher set anything.

    >>> read_world({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})
    World(rank=5, size=8, local_rank=1, local_size=4, node=1)

    Raises:
        PlatformError: A variable is not a number, or they contradict each other.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        names = {
            "rank": "RANK",
            "size": "WORLD_SIZE",
            "local_rank": "LOCAL_RANK",
            "local_size": "LOCAL_WORLD_SIZE",
        }
    elif "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        names = {
            "rank": "SLURM_PROCID",
            "size": "SLURM_NTASKS",
            "local_rank": "SLURM_LOCALID",
            "local_size": "SLURM_NTASKS_PER_NODE",
        }
    else:
        return World()
    given = {
        field: _number(environment, name, least=int("size" in field))
        for field, name in names.items()
        if name in environment
    }
    nodes = _first_number(environment, ("SLURM_JOB_NUM_NODES", "SLURM_NNODES"), least=1) or 1
    given.setdefault("local_size", -(-given.get("size", 1) // nodes))
    node = _first_number(environment, ("GROUP_RANK", "SLURM_NODEID"), least=0)
    if node is None:
        node = given.get("rank", 0) // given["local_size"]
    world = World(**given, node=node)
    if not 0 <= world.rank < world.size:
        raise PlatformError(f"RANK: {world.rank} is not below WORLD_SIZE {world.size}.")
    return world


def read_world_of_training(environment: Mapping[str, str]) -> World:
    """Return this process's place among those that train together: torchrun's, or this one alone.

    Raises:
        PlatformError: Another launcher started several processes, each of which would be a separate
            run.
    """
    if "RANK" in environment:
        return read_world(environment)
    if read_world(environment).size > 1 and "WORLD_SIZE" in environment:
        raise PlatformError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']} and RANK is unset. "
            "Start the run with torchrun, which sets both."
        )
    for launcher, (rank, size) in OTHER_LAUNCHERS.items():
        # the shell of a batch job has SLURM_NTASKS too, and is a single process outside any step
        in_step = (
            launcher != "srun"
            or "SLURM_STEP_ID" in environment
            or environment.get(rank, "0") != "0"
        )
        if rank in environment and in_step and environment.get(size, "1") != "1":
            raise PlatformError(
                f"{launcher} started {environment[size]} tasks of this program, and each would be "
                "a separate run with one process. Start it with torchrun, on several hosts with "
                "megatron-sorted launch."
            )
    return World()


def _number(environment: Mapping[str, str], name: str, least: int) -> int:
    value = environment[name]
    if not value.isdecimal() or int(value) < least:
        raise PlatformError(
            f"{name} is {value!r}, which is not a whole number of {least} or more. "
            "The launcher sets it: unset it."
        )
    return int(value)


def _first_number(environment: Mapping[str, str], names: Sequence[str], least: int) -> int | None:
    """Return the number in the first of these variables that is set; None if none is."""
    name = next((name for name in names if name in environment), None)
    return None if name is None else _number(environment, name, least)


def keep_device_packages_out() -> None:
    """Stop torch from loading device packages by itself; call it before torch is imported.

    torch_npu is loaded for --device npu alone, and without CANN it would make ``import torch``
    fail.
    """
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"


UNWANTED_RECORDS = {
    # 0.18 and newer: it lays the buffers out itself, as 0.16 did without a word
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
    # 0.19: it calls this function itself for every checkpoint that has a common.pt, as ours have
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
}
"""{logger of Megatron's: words of a warning that is meant for callers of its functions}."""


def silence_library_warnings() -> None:
    """Hide warnings that Megatron causes on every rank; call it before Megatron is imported.

    It warns that Apex and Transformer Engine are missing, which are optional here. And it calls
    torch's checkpoint functions and collectives by deprecated names, as we do where the new ones
    are younger than the oldest torch supported.
    """
    warnings.filterwarnings(
        "ignore", module=r"megatron\.|torch\.distributed\.(checkpoint\.|c10d_logger)"
    )
    for logger in UNWANTED_RECORDS:
        logging.getLogger(logger).addFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    """Return whether a record is none of those that only programmers can act on."""
    return UNWANTED_RECORDS[record.name] not in record.getMessage()
