"""Passes that are done again and again on the same memory: recorded where the device can, then replayed."""

import warnings
from collections.abc import Callable, Hashable
from typing import Any

from megatron_sorted.platform.graphs import Record

MOST_RECORDED = 256
"""Passes of one memory that are recorded; each takes some of the device's memory."""


class Passes:
    """Does passes, by name; from its second time on a pass is replayed.

    Args:
        record: Records one; None where the device cannot, and nothing is replayed.
    """

    def __init__(self, record: Record | None):
        self._record, self._recorded, self._done = record, {}, set()
        self.num_replays = 0

    def __call__(self, name: Hashable, work: Callable[[], Any]) -> Any:
        """Return what ``work`` returns; of a replayed pass it is valid until the next replay of the same name.

        Args:
            name: Of everything that it depends on, but for what is in the memory.
            work: As `Record` says.
        """
        if name not in self._recorded and not self._try(name, work):
            return work()
        found = self._recorded[name]
        found.replay()
        self.num_replays += 1
        return found.result

    def _try(self, name: Hashable, work: Callable[[], Any]) -> bool:
        """Return whether the pass is recorded now: most that come once do not come again."""
        if self._record is None or len(self._recorded) >= MOST_RECORDED:
            return False
        if name not in self._done:
            self._done.add(name)
            return False
        try:
            self._recorded[name] = self._record(work)
        except RuntimeError as error:
            self._record = None
            warnings.warn(
                f"passes are not recorded: {error}. Decoding goes on without graphs, slower. Load the network with graphs=False "
                "to not try it.",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        self._done.discard(name)
        return True
