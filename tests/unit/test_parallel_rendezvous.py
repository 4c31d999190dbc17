"""Ranks agree on a new name although the store holds keys of an earlier attempt."""

import threading
import time

import pytest
import torch.distributed as dist

from megatron_sorted.errors import PlatformError
from megatron_sorted.parallel.rendezvous import name_attempt


def meet(store, ranks, world_size=4, delays=None, timeout=5.0):
    """Return what each of ``ranks`` got, started after its delay."""
    results = {}

    def one(rank):
        time.sleep((delays or {}).get(rank, 0))
        try:
            results[rank] = name_attempt(store, rank, world_size, timeout)
        except PlatformError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_all_get_one_name():
    names = meet(dist.HashStore(), range(4))
    assert len(names) == 4 and len(set(names.values())) == 1


@pytest.mark.parametrize("late", [0, 1, 3])
def test_a_new_attempt_never_takes_the_name_of_the_one_before(late):
    store = dist.HashStore()
    before = meet(store, range(4))[0]
    # every rank but one starts at once, and reads a complete set of keys of the attempt before
    for _ in range(3):
        names = meet(store, range(4), delays={late: 0.15})
        assert len(names) == 4 and len(set(names.values())) == 1 and names[0] != before
        before = names[0]


def test_an_attempt_that_broke_off_does_no_harm():
    store = dist.HashStore()
    broken = meet(store, (0, 2), timeout=0.3)
    assert broken[0] == (
        "rank 0: not all 4 processes met within 0 s (missing: rank 1, 3). "
        "Look for their errors, or raise --distributed-timeout-minutes."
    )
    names = meet(store, range(4), delays={1: 0.1, 2: 0.2})
    assert len(set(names.values())) == 1
