"""How the processes of a torchrun job find each other anew after a restart.

torchrun keeps one store for all its attempts (torch 2.13), and processes that torchrun restarts read addresses of dead ones in it:
"Gloo connectFullMesh failed ... Connection refused" until every attempt is used up. The number of the attempt does not help: agents
of several hosts count their own restarts only. So the ranks of an attempt agree on a name that no other attempt has, and use only keys
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

    Each rank says hello with a word of its own. Rank 0 publishes a name with the words it has seen, again whenever one changes. A rank
    whose word is among them answers with the name; when all have, rank 0 lets them go. Words and names are drawn anew in every process,
    so nothing an earlier attempt has left can be mistaken for an answer.

    Collective: every rank of the job must call it; a few keys of the store a rank.

    Args:
        store: Shared by all ranks, and perhaps by earlier attempts.
        rank: Of this process.
        world_size: Number of ranks.
        timeout_seconds: How long to wait for the others.

    Raises:
        PlatformError: Some ranks did not come.
    """
    word, until = uuid.uuid4().hex, time.monotonic() + timeout_seconds
    store.set(f"hello/{rank}", word)
    seen: list[str | None] = []
    name = ""
    while time.monotonic() < until:
        if rank == 0:
            words = [_read(store, f"hello/{other}") for other in range(world_size)]
            if words != seen:
                seen, name = words, uuid.uuid4().hex
                store.set("attempt", json.dumps({"name": name, "words": seen}))
            store.set("answer/0", name)
            if all(_read(store, f"answer/{other}") == name for other in range(world_size)):
                store.set(f"go/{name}", "1")
                return name
        else:
            offer = json.loads(_read(store, "attempt") or '{"words": []}')
            if offer["words"][rank : rank + 1] == [word]:
                if offer["name"] != name:
                    name = offer["name"]
                    store.set(f"answer/{rank}", name)
                if store.check([f"go/{name}"]):
                    return name
        time.sleep(POLL_SECONDS)
    missing = [str(other) for other in range(world_size) if _read(store, f"answer/{other}") != name]
    raise PlatformError(
        f"rank {rank}: not all {world_size} processes met within {timeout_seconds:.0f} s (missing: rank "
        f"{', '.join(missing[:8])}). Look for their errors, or raise --distributed-timeout-minutes."
    )


def _read(store: dist.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return a store of this attempt alone, this process's rank and the number of ranks.

    Collective: every rank of the job must call it.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    name = name_attempt(store, rank, world_size, timeout.total_seconds())
    return dist.PrefixStore(name, store), rank, world_size
