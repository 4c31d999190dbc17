"""Repeated forward passes on the same memory, recorded as graphs and replayed if the device can."""

import warnings
from collections.abc import Callable, Hashable
from typing import Any

from megatron_sorted.platform.graphs import Record

MAX_RECORDED = 256
"""Maximum number of passes recorded for one cache; each takes some of the device's memory."""


class Passes:
    """Forward passes by name: the first time a pass runs, the second time it is recorded.

    Later calls replay the recording.

    Args:
        record: Function that records a pass; None if the device cannot, and nothing is replayed.
    """

    def __init__(self, record: Record | None):
        self._record, self._recorded, self._done = record, {}, set()
        self.num_replays = 0

    def __call__(self, name: Hashable, work: Callable[[], Any]) -> Any:
        """Run or replay a pass; a replayed result is valid until the next replay of that name.

        Args:
            name: Everything that the pass depends on, except the contents of the cache.
            work: The pass; see `Record`.
        """
        if name not in self._recorded and not self._try_to_record(name, work):
            return work()
        recorded = self._recorded[name]
        recorded.replay()
        self.num_replays += 1
        return recorded.result

    def _try_to_record(self, name: Hashable, work: Callable[[], Any]) -> bool:
        """Record the pass the second time it is needed, since most run only once.

        Returns:
            Whether it is recorded now.
        """
        if self._record is None or len(self._recorded) >= MAX_RECORDED:
            return False
        if name not in self._done:
            self._done.add(name)
            return False
        try:
            self._recorded[name] = self._record(work)
        except RuntimeError as error:
            self._record = None
            warnings.warn(
                f"passes are not recorded: {error}. Decoding continues without graphs, which is "
                "slower. Load the network with graphs=False to skip the attempt.",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        self._done.discard(name)
        return True
