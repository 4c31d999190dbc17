"""The job a process is part of, as torchrun or srun says it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """Where this process stands.

    Attributes:
        rank: Of this process.
        size: Number of processes.
        local_rank: Of this process on its node.
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
        """Returns how many nodes there are, if all have as many processes as this one."""
        return -(-self.size // self.local_size)


def read_world(environment: Mapping[str, str]) -> World:
    """Returns the job of this process; one process if no launcher set anything.

    Raises:
        ValueError: A variable is not a number, or they contradict each other.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        names = {"rank": "RANK", "size": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_size": "LOCAL_WORLD_SIZE"}
    elif "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        names = {"rank": "SLURM_PROCID", "size": "SLURM_NTASKS", "local_rank": "SLURM_LOCALID", "local_size": "SLURM_NTASKS_PER_NODE"}
    else:
        return World()
    given = {field: _number(environment, name, least=int("size" in field)) for field, name in names.items() if name in environment}
    size = given.get("size", 1)
    nodes = next((_number(environment, name, least=1) for name in ("SLURM_JOB_NUM_NODES", "SLURM_NNODES") if name in environment), 1)
    given.setdefault("local_size", -(-size // nodes))
    node = next((_number(environment, name, least=0) for name in ("GROUP_RANK", "SLURM_NODEID") if name in environment), None)
    world = World(**given, node=node if node is not None else given.get("rank", 0) // given["local_size"])
    if not 0 <= world.rank < world.size:
        raise ValueError(f"RANK: {world.rank} is not below WORLD_SIZE {world.size}.")
    return world


def _number(environment: Mapping[str, str], name: str, least: int) -> int:
    value = environment[name]
    if not value.isdecimal() or int(value) < least:
        raise ValueError(f"{name} is {value!r}, which is not a whole number of {least} or more. It is the launcher's to set: unset it.")
    return int(value)
