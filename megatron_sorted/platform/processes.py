"""Which process of a job this is, as torchrun or srun says it, and what it settles before torch is imported.

The trainer and the doctor read it here; the standard library will do.
"""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sorted.errors import PlatformError

OTHER_LAUNCHERS = {
    "srun": ("SLURM_PROCID", "SLURM_NTASKS"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE"),
}
"""{launcher: the variables in which a task finds its number and how many there are}."""


@dataclass(frozen=True)
class World:
    """Where this process stands.

    Attributes:
        rank: Rank of this process.
        size: Number of processes.
        local_rank: Its rank on its node.
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
        """Return how many nodes there are, if all have as many processes as this one."""
        return -(-self.size // self.local_size)


def read_world(environment: Mapping[str, str]) -> World:
    """Return the job of this process; one process if no launcher set anything.

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
    size = given.get("size", 1)
    nodes = next(
        (
            _number(environment, name, least=1)
            for name in ("SLURM_JOB_NUM_NODES", "SLURM_NNODES")
            if name in environment
        ),
        1,
    )
    given.setdefault("local_size", -(-size // nodes))
    node = next(
        (
            _number(environment, name, least=0)
            for name in ("GROUP_RANK", "SLURM_NODEID")
            if name in environment
        ),
        None,
    )
    world = World(
        **given, node=node if node is not None else given.get("rank", 0) // given["local_size"]
    )
    if not 0 <= world.rank < world.size:
        raise PlatformError(f"RANK: {world.rank} is not below WORLD_SIZE {world.size}.")
    return world


def read_world_of_training(environment: Mapping[str, str]) -> World:
    """Return the processes that train together, of which this is one: those of torchrun, or this one alone.

    Raises:
        PlatformError: Another launcher started several, each of which would be a run of its own.
    """
    if "RANK" in environment:
        return read_world(environment)
    if read_world(environment).size > 1 and "WORLD_SIZE" in environment:
        raise PlatformError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']} and RANK is unset. Start the run with torchrun, which sets both."
        )
    for launcher, (rank, size) in OTHER_LAUNCHERS.items():
        # the shell of a batch job has SLURM_NTASKS as well, and is one process outside any step
        in_step = (
            launcher != "srun"
            or "SLURM_STEP_ID" in environment
            or environment.get(rank, "0") != "0"
        )
        if rank in environment and in_step and environment.get(size, "1") != "1":
            raise PlatformError(
                f"{launcher} started {environment[size]} tasks of this program, and each would be a run of its own with one process. "
                "Start it with torchrun, on several hosts with slurm/gpu.sbatch, slurm/npu.sbatch or slurm/launch_hosts.sh."
            )
    return World()


def _number(environment: Mapping[str, str], name: str, least: int) -> int:
    value = environment[name]
    if not value.isdecimal() or int(value) < least:
        raise PlatformError(
            f"{name} is {value!r}, which is not a whole number of {least} or more. It is the launcher's to set: unset it."
        )
    return int(value)


def keep_device_packages_out() -> None:
    """Stop torch from loading device packages by itself. Call it before torch is imported.

    torch_npu is loaded for --device npu alone, and where CANN is missing it would make ``import torch`` fail.
    """
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"


def silence_library_warnings() -> None:
    """Hide what Megatron says on every rank. Call it before Megatron is imported.

    It says that Apex and Transformer Engine are missing, which are optional here, and calls torch's checkpoint functions and
    collectives by deprecated names, as we do where the new ones are younger than the oldest torch supported.
    """
    warnings.filterwarnings(
        "ignore", module=r"megatron\.|torch\.distributed\.(checkpoint\.|c10d_logger)"
    )
