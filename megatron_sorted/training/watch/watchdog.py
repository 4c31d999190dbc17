"""Ends the job when it hangs, and names the rank to blame.

A thread on every rank writes a heartbeat into the store through which the processes found each
other. The launcher or rank 0 serves the store over connections of its own, so heartbeats arrive
although all ranks are stuck in a collective operation.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict

import torch.distributed as dist

from megatron_sorted.errors import TrainingError
from megatron_sorted.training.watch.diagnosis import Heartbeat, find_culprits

# Python files in which a main thread waits for other ranks.
WAITING_FILES = ("torch/distributed/", "megatron/core/pipeline_parallel/p2p_communication")


def _place_of(thread_id: int) -> tuple[str, bool]:
    """Return a thread's place in the code, and whether it waits there for other ranks.

    The place is a file, line and function, of this package rather than of a library.
    """
    frame = sys._current_frames().get(thread_id)
    if frame is None:
        return "unknown place", False
    stack = traceback.extract_stack(frame)
    waits = any(name in stack[-1].filename for name in WAITING_FILES)
    libraries = (sys.prefix, sys.base_prefix)
    own = [
        entry
        for entry in stack
        if "megatron_sorted" in entry.filename or not entry.filename.startswith(libraries)
    ] or [stack[-1]]
    return f"{os.path.basename(own[-1].filename)}:{own[-1].lineno} in {own[-1].name}", waits


class Watchdog:
    """A thread that checks that this rank makes progress.

    Args:
        timeout_seconds: The time without a mark after which the job counts as hanging.
        on_hang: A function that ends the process. It is called on the watchdog's thread with the
            error and whether another rank reports it.
    """

    def __init__(self, timeout_seconds: float, on_hang: Callable[[TrainingError, bool], None]):
        self.timeout_seconds, self.on_hang = timeout_seconds, on_hang
        self.interval_seconds = min(5.0, timeout_seconds / 8)
        self._mark, self._phase, self._since, self._beat = 0, "start", time.monotonic(), 0
        self._main = threading.main_thread().ident
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._over = threading.Event()
        # a connection of its own: another thread's wait would block a shared one
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Send a first heartbeat and start the thread.

        So a rank that stops right afterwards can be named as well.
        """
        self._since = time.monotonic()
        self._send()
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def mark(self, phase: str) -> None:
        """Record that this rank begins a phase; ranks that work together pass the same marks."""
        self._mark += 1
        self._phase, self._since = phase, time.monotonic()

    def alive(self) -> None:
        """Record that this rank makes progress inside a phase."""
        self._since = time.monotonic()

    def _send(self) -> None:
        """Write this rank's heartbeat into the store."""
        place, waits = _place_of(self._main)
        heartbeat = Heartbeat(
            dist.get_rank(),
            socket.gethostname(),
            os.getpid(),
            self._beat,
            self._mark,
            self._phase,
            place,
            waits,
        )
        self._store.set(f"heartbeat/{heartbeat.rank}", json.dumps(asdict(heartbeat)))

    def _read(self) -> dict[int, Heartbeat]:
        """Return the heartbeats in the store, by rank."""
        keys = [f"heartbeat/{rank}" for rank in range(dist.get_world_size())]
        present = [key for key in keys if self._store.check([key])]
        heartbeats = [Heartbeat(**json.loads(self._store.get(key))) for key in present]
        return {heartbeat.rank: heartbeat for heartbeat in heartbeats}

    def _seconds_stalled(self) -> float:
        return time.monotonic() - self._since

    def _watch(self) -> None:
        while not self._over.wait(self.interval_seconds):
            if self._launcher is not None and os.getppid() != self._launcher:
                error = TrainingError(
                    "the launcher of this process has ended, so no other process would notice the "
                    "end of another rank."
                )
                self.on_hang(error, False)
            try:
                self._beat += 1
                self._send()
                stalled = self._seconds_stalled()
                if stalled > self.timeout_seconds:
                    self._end(stalled)
            except Exception as error:  # no store without its server: the job or rank 0 has ended
                stalled = self._seconds_stalled()
                if stalled > self.timeout_seconds and not self._over.is_set():
                    message = (
                        f"no progress for {stalled:.0f} s in {self._phase}, and the store that "
                        f"rank 0 or the launcher serves does not answer ({error}): it has "
                        "stopped, died or is cut off."
                    )
                    self.on_hang(TrainingError(message), False)

    def _end(self, stalled: float) -> None:
        """Report the ranks to blame, unless this rank makes progress again."""
        earlier = self._read()
        for _ in range(3):  # a rank that lives sends another heartbeat in this time
            self._over.wait(self.interval_seconds)
            self._beat += 1
            self._send()
        if self._seconds_stalled() < self.timeout_seconds:
            return
        now = self._read()
        culprits, why = find_culprits(earlier, now, dist.get_world_size())
        if dist.get_rank() in culprits:
            stack = "".join(traceback.format_stack(sys._current_frames()[self._main]))
            print(f"rank {dist.get_rank()} hangs here:\n{stack}", file=sys.stderr, flush=True)
        error = TrainingError(
            f"no progress for {stalled:.0f} s: {why}. Remove the cause, or raise "
            "--hang-timeout-minutes if work takes this long; start again with --load."
        )
        reporter = min((rank for rank in now if rank not in culprits), default=min(now))
        self.on_hang(error, dist.get_rank() != reporter)
