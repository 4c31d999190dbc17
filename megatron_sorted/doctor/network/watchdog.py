"""Heartbeats of every process, and the thread of rank 0 that ends a test without progress."""

import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping

import torch.distributed as dist

from megatron_sorted.doctor.finding import Finding, fail, first_of
from megatron_sorted.doctor.network.rendezvous import dismiss, gather, put

INTERVAL_SECONDS, LAST_ERRORS_SECONDS = 0.5, 3.0


def explain(
    phases: Mapping[int, tuple[int, str]],
    errors: Mapping[int, str],
    silent: Collection[int],
    names: Mapping[int, str],
    stopped: bool,
    limit_seconds: float,
) -> Finding:
    """Return the reason why a test ended early.

    Args:
        phases: Number and name of the phase each rank began last.
        errors: Errors of ranks that gave up.
        silent: Ranks without a heartbeat.
        names: Names of all ranks, with their hosts.
        stopped: Whether the launcher ended the job.
        limit_seconds: Time without progress after which a test is ended.
    """
    at = {rank: phases.get(rank, (0, "start")) for rank in names}
    late = sorted(silent) or [rank for rank in names if at[rank] == min(at.values())]
    phase = max(at.values())[1]
    if len(late) < len(names):
        value = f"in {phase} the others wait for {first_of([names[rank] for rank in late], 8)}"
        value += ", without a sign of life" if silent else ""
    else:
        value = f"failed in {phase}" if errors else f"all processes stand still in {phase}"
    if stopped:
        value = f"the launcher ended the job, since a process had ended; {value}"
    elif not errors:
        value += f", for {limit_seconds:.0f} s"
    messages = [
        f"{names[rank]}: {' '.join(text.split())[:200]}"
        for rank, text in sorted(errors.items())[:3]
    ]
    remedy = (
        "Look at these hosts: is the process alive, are interface and device in order (lines "
        "above)? Test again without them; a larger --limit-seconds helps if they are only slow."
    )
    return fail("network test", ". ".join([value, *filter(None, ["; ".join(messages)])]), remedy)


class _StoreThread(threading.Thread):
    """A thread with a connection of its own to the job's store, so that no other one blocks it."""

    def __init__(self, store: dist.Store):
        super().__init__(name=type(self).__name__, daemon=True)
        self.store, self._ended = store, threading.Event()

    def stop(self) -> None:
        """End the thread: the test has finished."""
        self._ended.set()
        self.join()


class PeerHeartbeat(_StoreThread):
    """Signs of life of this process, until it ends.

    Args:
        store: The job's store; a connection of its own.
        rank: This process's rank.
    """

    def __init__(self, store: dist.Store, rank: int):
        super().__init__(store)
        self.rank = rank

    def run(self) -> None:
        """Put a growing number into the store."""
        beat = 0
        while not self._ended.wait(INTERVAL_SECONDS):
            beat += 1
            try:
                put(self.store, "beat", self.rank, beat)
            except RuntimeError:  # the store has ended with rank 0
                return


class PeerWatchdog(_StoreThread):
    """The end of a test that makes no progress.

    Args:
        store: The job's store; a connection of its own.
        names: Names of all ranks, with their hosts.
        limit_seconds: Time without any progress after which the test is ended.
        on_end: Prints the reason and all findings; the process then ends with status 1.
    """

    def __init__(
        self,
        store: dist.Store,
        names: Mapping[int, str],
        limit_seconds: float,
        on_end: Callable[[Finding], int],
    ):
        super().__init__(store)
        self.names, self.limit_seconds, self.on_end = names, limit_seconds, on_end

    def run(self) -> None:
        """Watch all processes until it is stopped, or ends this one."""
        ranks, before, since = list(self.names), None, time.monotonic()
        while not self._ended.is_set():
            stopped = signal.sigtimedwait({signal.SIGTERM}, INTERVAL_SECONDS) is not None
            phases = gather(self.store, "phase", ranks, 0)
            errors = gather(self.store, "error", ranks, 0)
            if phases != before:
                before, since = phases, time.monotonic()
            if not (stopped or errors or time.monotonic() - since > self.limit_seconds):
                continue
            earlier = gather(self.store, "beat", ranks, 0)
            time.sleep(LAST_ERRORS_SECONDS)
            now = gather(self.store, "beat", ranks, 0)
            silent = [rank for rank in ranks if now.get(rank) == earlier.get(rank)]
            last = gather(self.store, "phase", ranks, 0)
            errors = gather(self.store, "error", ranks, 0)
            at = {rank: tuple(phase) for rank, phase in last.items()}
            self.on_end(explain(at, errors, silent, self.names, stopped, self.limit_seconds))
            dismiss(self.store, len(self.names))
            os._exit(1)
