"""Work for a device that is recorded once and replayed as a whole.

So the host need not launch its kernels one by one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Recording:
    """Recorded work.

    Attributes:
        replay: Function that repeats the work, on the same memory.
        result: Result of the work; each replay overwrites it.
    """

    replay: Callable[[], None]
    result: Any


Record = Callable[[Callable[[], Any]], Recording]
"""Function that does some work and records it.

The work must use memory that stays allocated, must not synchronise with the device, and must be
harmless to repeat.
"""


class CudaGraphs:
    """A recorder of CUDA graphs, on a separate stream, with a common pool for temporary memory.

    torch.accelerator.Graph does not support CUDA in torch 2.13.
    """

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Any]) -> Recording:
        """Record the work as a graph.

        The work runs once before, because libraries initialise themselves at the first use of a
        stream.
        """
        with torch.cuda.device(self.device):
            current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                work()
            current.wait_stream(self.stream)
            # restores the current stream, which a recording that fails would not
            with (
                torch.cuda.stream(current),
                torch.cuda.graph(graph, self.pool, self.stream, "thread_local"),
            ):
                result = work()
        return Recording(graph.replay, result)


def graphs_of(device: torch.device) -> Callable[[], Record] | None:
    """Return a factory of recorders for ``device``; None for a device without graphs."""
    return (lambda: CudaGraphs(device)) if device.type == "cuda" else None
