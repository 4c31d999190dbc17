"""The rendezvous of a torchrun job's processes after a restart.

torchrun keeps one store for all its attempts (torch 2.13), and restarted processes read addresses
of dead ones in it: "Gloo connectFullMesh failed ... Connection refused" until no attempt is left.
The number of the attempt does not help, because the agents of several hosts count only their own
restarts. So the ranks of an attempt agree on a name that no other attempt has, and use only keys
under that name.
"""

import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from megatron_sorted.errors import PlatformError

POLL_SECONDS = 0.02


def has_shared_store() -> bool:
    """Return whether this process was started by a launcher whose store outlives it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def name_attempt(store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """Return the name of this attempt, the same on all ranks that are alive together.

    Each rank publishes a random token under hello/RANK. Rank 0 offers a name together with the
    tokens it has read, again whenever one changes. A rank whose token is in the offer confirms the
    name; when all have, rank 0 starts them. Every process draws its tokens and names anew, so keys
    of an earlier attempt cannot be mistaken for a confirmation.

    Collective: every rank of the job must call it; it uses a few keys of the store per rank.

    Args:
        store: Store shared by all ranks, and perhaps by earlier attempts.
        rank: Rank of this process.
        world_size: Number of ranks.
        timeout_seconds: Time to wait for the others.

    Raises:
        PlatformError: Some ranks did not confirm in time.
    """
    token, until = uuid.uuid4().hex, time.monotonic() + timeout_seconds
    store.set(f"hello/{rank}", token)
    offered: list[str | None] = []
    name = ""
    while time.monotonic() < until:
        if rank == 0:
            tokens = [_read(store, f"hello/{other}") for other in range(world_size)]
            if tokens != offered:
                offered, name = tokens, uuid.uuid4().hex
                store.set("attempt", json.dumps({"name": name, "tokens": offered}))
            store.set("answer/0", name)
            if all(_read(store, f"answer/{other}") == name for other in range(world_size)):
                store.set(f"go/{name}", "1")
                return name
        else:
            offer = json.loads(_read(store, "attempt") or '{"tokens": []}')
            if offer["tokens"][rank : rank + 1] == [token]:
                if offer["name"] != name:
                    name = offer["name"]
                    store.set(f"answer/{rank}", name)
                if store.check([f"go/{name}"]):
                    return name
        time.sleep(POLL_SECONDS)
    missing = [str(other) for other in range(world_size) if _read(store, f"answer/{other}") != name]
    raise PlatformError(
        f"rank {rank}: not all {world_size} processes met within {timeout_seconds:.0f} s "
        f"(missing: rank {', '.join(missing[:8])}). "
        "Look for their errors, or raise --distributed-timeout-minutes."
    )


def _read(store: dist.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return a store for this attempt alone, this process's rank and the number of ranks.

    Collective: every rank of the job must call it.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    name = name_attempt(store, rank, world_size, timeout.total_seconds())
    return dist.PrefixStore(name, store), rank, world_size
