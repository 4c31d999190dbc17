"""Ends the job when it hangs, and says which rank is to blame.

A thread on every rank puts a sign of life into the store through which the processes found each other; the store is served by the
launcher or rank 0, over connections of its own, so signs arrive although all ranks are stuck in a collective operation.
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
from megatron_sorted.training.watch.diagnosis import Sign, find_culprits

# Python files in which a main thread waits for other ranks.
WAITING_FILES = ("torch/distributed/", "megatron/core/pipeline_parallel/p2p_communication")


def _place_of(thread_id: int) -> tuple[str, bool]:
    """Return where a thread is, as file, line and function (no library's if possible), and whether it waits for other ranks."""
    frame = sys._current_frames().get(thread_id)
    if frame is None:
        return "unknown place", False
    stack = traceback.extract_stack(frame)
    waits = any(word in stack[-1].filename for word in WAITING_FILES)
    libraries = (sys.prefix, sys.base_prefix)
    own = [
        entry
        for entry in stack
        if "megatron_sorted" in entry.filename or not entry.filename.startswith(libraries)
    ] or [stack[-1]]
    return f"{os.path.basename(own[-1].filename)}:{own[-1].lineno} in {own[-1].name}", waits


class Watchdog:
    """Watches that this rank gets on.

    Args:
        timeout_seconds: Without a mark for so long, the job hangs.
        on_hang: Called on the thread of the watchdog with the error and whether another rank says it; ends the process.
    """

    def __init__(self, timeout_seconds: float, on_hang: Callable[[TrainingError, bool], None]):
        self.timeout_seconds, self.on_hang = timeout_seconds, on_hang
        self.interval_seconds = min(5.0, timeout_seconds / 8)
        self._mark, self._phase, self._since, self._beat = 0, "start", time.monotonic(), 0
        self._main = threading.main_thread().ident
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._over = threading.Event()
        # a connection of its own: another thread's wait would keep it from being used
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start watching, with a first sign: a rank that stops right after it can be named as well."""
        self._since = time.monotonic()
        self._say(self._beat)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def mark(self, phase: str) -> None:
        """Record that this rank begins a phase; ranks that work together must pass the same marks."""
        self._mark += 1
        self._phase, self._since = phase, time.monotonic()

    def alive(self) -> None:
        """Record that this rank gets on inside a phase."""
        self._since = time.monotonic()

    def _say(self, beat: int) -> None:
        place, waits = _place_of(self._main)
        sign = Sign(
            dist.get_rank(),
            socket.gethostname(),
            os.getpid(),
            beat,
            self._mark,
            self._phase,
            place,
            waits,
        )
        self._store.set(f"sign/{sign.rank}", json.dumps(asdict(sign)))

    def _read(self) -> dict[int, Sign]:
        keys = [f"sign/{rank}" for rank in range(dist.get_world_size())]
        there = [key for key in keys if self._store.check([key])]
        signs = [Sign(**json.loads(self._store.get(key))) for key in there]
        return {sign.rank: sign for sign in signs}

    def _watch(self) -> None:
        while not self._over.wait(self.interval_seconds):
            if self._launcher is not None and os.getppid() != self._launcher:
                self.on_hang(
                    TrainingError(
                        "the launcher of this process is gone, so nobody would notice the end of another rank."
                    ),
                    False,
                )
            try:
                self._beat += 1
                self._say(self._beat)
                stalled = time.monotonic() - self._since
                if stalled > self.timeout_seconds:
                    self._end(stalled)
            except (
                Exception
            ) as error:  # the store is gone with its server: the job is over, or rank 0 is
                if (
                    time.monotonic() - self._since > self.timeout_seconds
                    and not self._over.is_set()
                ):
                    self.on_hang(
                        TrainingError(
                            f"no progress for {time.monotonic() - self._since:.0f} s in {self._phase}, and the store that rank 0 or the "
                            f"launcher serves does not answer ({error}): it has stopped, died or is cut off."
                        ),
                        False,
                    )

    def _end(self, stalled: float) -> None:
        earlier = self._read()
        for _ in range(3):  # whoever lives gives another sign in this time
            self._over.wait(self.interval_seconds)
            self._beat += 1
            self._say(self._beat)
        if time.monotonic() - self._since < self.timeout_seconds:
            return
        now = self._read()
        culprits, why = find_culprits(earlier, now, dist.get_world_size())
        mine = dist.get_rank() in culprits
        if mine:
            stack = "".join(traceback.format_stack(sys._current_frames()[self._main]))
            print(f"rank {dist.get_rank()} hangs here:\n{stack}", file=sys.stderr, flush=True)
        error = TrainingError(
            f"no progress for {stalled:.0f} s: {why}. Mend its cause, or raise --hang-timeout-minutes if work takes so "
            "long; start again with --load."
        )
        speaks = min((rank for rank in now if rank not in culprits), default=min(now))
        self.on_hang(error, dist.get_rank() != speaks)
