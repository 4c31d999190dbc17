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
    given = {field: int(environment[name]) for field, name in names.items() if name in environment}
    size = given.get("size", 1)
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", environment.get("SLURM_NNODES", 1))) if "local_size" not in given else 1
    given.setdefault("local_size", -(-size // nodes))
    node = environment.get("GROUP_RANK", environment.get("SLURM_NODEID"))
    world = World(**given, node=int(node) if node is not None else given.get("rank", 0) // given["local_size"])
    if not 0 <= world.rank < world.size:
        raise ValueError(f"RANK: {world.rank} is not below WORLD_SIZE {world.size}.")
    return world
