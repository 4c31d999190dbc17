"""Work for a device that is recorded once and replayed as a whole, so that the host need not launch its kernels one by one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Recording:
    """Recorded work.

    Attributes:
        replay: Does it again, on the same memory.
        result: What it returned; each replay writes it anew.
    """

    replay: Callable[[], None]
    result: Any


Record = Callable[[Callable[[], Any]], Recording]
"""Does some work and records it. It must read and write memory that stays where it is, ask the device for nothing, and do no harm when
it is done twice."""


class CudaGraphs:
    """Records work as CUDA graphs, on a stream of their own, with common memory for what is needed in between.

    torch.accelerator.Graph has no CUDA below it in torch 2.13.
    """

    def __init__(self, device: torch.device):
        self.device, self.stream, self.pool = (
            device,
            torch.cuda.Stream(device),
            torch.cuda.graph_pool_handle(),
        )

    def __call__(self, work: Callable[[], Any]) -> Recording:
        """Return the work as a graph; it is done before, since libraries set themselves up at the first use of a stream."""
        with torch.cuda.device(self.device):
            here, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                work()
            here.wait_stream(self.stream)
            # a recording that fails would leave its own stream in place
            with (
                torch.cuda.stream(here),
                torch.cuda.graph(graph, self.pool, self.stream, "thread_local"),
            ):
                result = work()
        return Recording(graph.replay, result)


def graphs_of(device: torch.device) -> Callable[[], Record] | None:
    """Return what makes a recorder of graphs for ``device``; None where it has none."""
    return (lambda: CudaGraphs(device)) if device.type == "cuda" else None
