"""What all ranks decide together between steps, without any of them waiting for the others or for the device."""

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist

from megatron_sorted.platform.contract import Platform


@dataclass(frozen=True)
class Flags:
    """What one rank says, or after the exchange the largest value that any rank said.

    Attributes:
        stop_signal: Number of a stop signal received, or 0.
        time_is_up: 1 once --exit-duration-in-mins has passed.
        save_busy: 1 while a save in the background is on its way.
    """

    stop_signal: int = 0
    time_is_up: int = 0
    save_busy: int = 0


class Control:
    """Exchanges flags once a step over host memory, while the optimizer works, so that nobody waits for the answer."""

    def __init__(self, platform: Platform):
        """Makes a group for the exchanges.

        Collective: creates a process group of all ranks; every process must make a control.
        """
        self._group = dist.new_group(backend=platform.host_backend)
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def start(self, flags: Flags) -> None:
        """Begins an exchange.

        Collective: starts one all-reduce of a few numbers over all ranks.
        """
        said = torch.tensor([getattr(flags, field.name) for field in fields(Flags)], dtype=torch.int32, device="cpu")
        self._pending = (dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self._group, async_op=True), said)

    def finish(self) -> Flags:
        """Returns the largest value of each flag over all ranks.

        Collective: completes the all-reduce that `start` began.
        """
        assert self._pending is not None, "no exchange was started"
        work, said = self._pending
        work.wait()
        self._pending = None
        return Flags(*said.tolist())
