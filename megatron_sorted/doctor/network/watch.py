"""Signs of life of every process, and rank 0's thread that ends a test which does not get on, naming those it waits for."""

import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping

import torch.distributed as dist

from megatron_sorted.doctor.finding import Finding, broken, some
from megatron_sorted.doctor.network.meeting import dismiss, gather, put

LOOK_SECONDS, LAST_WORDS_SECONDS = 0.5, 3.0


def explain(
    phases: Mapping[int, tuple[int, str]],
    errors: Mapping[int, str],
    silent: Collection[int],
    names: Mapping[int, str],
    was_told_to_stop: bool,
    limit_seconds: float,
) -> Finding:
    """Return why a test ended early.

    Args:
        phases: Number and name of the phase each rank began last.
        errors: What ranks said before they gave up.
        silent: Ranks that give no sign of life any more.
        names: Names of all ranks, with their hosts.
        was_told_to_stop: Whether the launcher ended the job.
        limit_seconds: After which a test that stands still is ended.
    """
    at = {rank: phases.get(rank, (0, "start")) for rank in names}
    late = sorted(silent) or [rank for rank in names if at[rank] == min(at.values())]
    said = "; ".join(
        f"{names[rank]}: {' '.join(text.split())[:200]}"
        for rank, text in sorted(errors.items())[:3]
    )
    where = f"in {max(at.values())[1]}"
    if len(late) < len(names):
        value = f"{where} the others wait for {some([names[rank] for rank in late], 8)}" + (
            ", without a sign of life" if silent else ""
        )
    else:
        value = f"all processes stand still {where}" if not errors else f"failed {where}"
    if was_told_to_stop:
        value = f"the launcher ended the job, since a process had ended; {value}"
    elif not errors:
        value += f", for {limit_seconds:.0f} s"
    return broken(
        "network test",
        value + (f". {said}" if said else ""),
        "Look at these hosts: is the process alive, are interface and device in order (lines above)? Test again without them; "
        "a larger --limit-seconds helps where they are only slow.",
    )


class Heart(threading.Thread):
    """Gives signs of life until the process ends.

    Args:
        store: The job's store; a connection of its own.
        rank: This process's rank.
    """

    def __init__(self, store: dist.Store, rank: int):
        super().__init__(name="heart", daemon=True)
        self.store, self.rank, self._over = store, rank, threading.Event()

    def stop(self) -> None:
        """Fall silent: the test has come to its end."""
        self._over.set()
        self.join()

    def run(self) -> None:
        """Put a growing number into the store."""
        beat = 0
        while not self._over.wait(LOOK_SECONDS):
            beat += 1
            try:
                put(self.store, "beat", self.rank, beat)
            except RuntimeError:  # the store is gone with rank 0
                return


class Watch(threading.Thread):
    """Looks at how far all processes are.

    Args:
        store: The job's store; a connection of its own, since another thread's wait would hold it up.
        names: Names of all ranks, with their hosts.
        limit_seconds: Time without any progress after which the test is ended.
        on_end: Prints what is known; the process is then ended with status 1.
    """

    def __init__(
        self,
        store: dist.Store,
        names: Mapping[int, str],
        limit_seconds: float,
        on_end: Callable[[Finding], None],
    ):
        super().__init__(name="watch", daemon=True)
        self.store, self.names, self.limit_seconds, self.on_end = (
            store,
            names,
            limit_seconds,
            on_end,
        )
        self._over = threading.Event()

    def stop(self) -> None:
        """Stop looking: the test has come to its end."""
        self._over.set()
        self.join()

    def run(self) -> None:
        """Look until it is stopped, or ends the process."""
        ranks, before, since = list(self.names), None, time.monotonic()
        while not self._over.is_set():
            told = signal.sigtimedwait({signal.SIGTERM}, LOOK_SECONDS) is not None
            phases, errors = (
                gather(self.store, "phase", ranks, 0),
                gather(self.store, "error", ranks, 0),
            )
            if phases != before:
                before, since = phases, time.monotonic()
            if not (told or errors or time.monotonic() - since > self.limit_seconds):
                continue
            earlier = gather(self.store, "beat", ranks, 0)
            time.sleep(LAST_WORDS_SECONDS)
            now = gather(self.store, "beat", ranks, 0)
            silent = [rank for rank in ranks if now.get(rank) == earlier.get(rank)]
            phases = {
                rank: tuple(phase) for rank, phase in gather(self.store, "phase", ranks, 0).items()
            }
            errors = gather(self.store, "error", ranks, 0)
            self.on_end(explain(phases, errors, silent, self.names, told, self.limit_seconds))
            dismiss(self.store, len(self.names))
            os._exit(1)
