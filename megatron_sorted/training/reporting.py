"""What happened since the last report, and the report of it."""

import statistics
import time

from megatron_sorted.loss.ledger import Ledger
from megatron_sorted.monitoring.report import ExitNumbers, StepReport
from megatron_sorted.settings.derived import global_batch_size
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.forward_step import ForwardStep
from megatron_sorted.training.reduce import reduce_ledger
from megatron_sorted.training.step import StepResult


class Interval:
    """Steps since the last report. Steps that were skipped for a number that is not finite leave nothing in its means."""

    def __init__(self, settings: Settings, world_size: int):
        self.settings, self.world_size = settings, world_size
        self.ledger = Ledger()
        self.rates: list[float] = []
        self._start_anew()

    def _start_anew(self) -> None:
        self.ledger.clear()
        self.steps = self.skipped = self.nonfinite = 0
        self._since, self._paused = time.monotonic(), 0.0

    def add(self, result: StepResult, forward_step: ForwardStep) -> None:
        """Takes in one step."""
        self.steps += 1
        self.skipped += not result.stepped
        self.nonfinite += result.not_finite is not None
        if result.not_finite is None:
            self.ledger.merge(forward_step.ledger)

    def pause(self, seconds: float) -> None:
        """Leaves out time that was not spent on steps: evaluation, a save in the foreground."""
        self._paused += seconds

    def report(self, result: StepResult, step: int, samples: int, learning_rate: float, loss_scale: float,
               coefficients: dict[int, float]) -> StepReport:
        """Returns the report of the steps taken in, and starts anew.

        Collective: one small all-reduce over all ranks. The host waits for the device.

        Args:
            result: Of the last step.
            step: Steps done.
            samples: Samples consumed.
            learning_rate: Of the last step.
            loss_scale: Of fp16, else 1.
            coefficients: Of the last step.
        """
        settings = self.settings
        found = reduce_ledger(self.ledger, settings)
        self.rates.append((time.monotonic() - self._since - self._paused) / max(self.steps, 1))
        # the first step also warms up caches and allocators: it says nothing of the time left
        usual = self.rates[-1] if len(self.rates) < 3 else statistics.median(self.rates[1:][-100:])
        samples_a_step = global_batch_size(settings, self.world_size)
        tokens_per_second = samples_a_step * settings.seq_length / self.rates[-1]
        report = StepReport(
            step=step, total_steps=settings.train_iters, samples=samples, learning_rate=learning_rate, grad_norm=result.grad_norm,
            loss_scale=loss_scale, skipped=self.skipped, step_seconds=self.rates[-1], tokens_per_second=tokens_per_second,
            seconds_left=usual * (settings.train_iters - step),
            exits={d: ExitNumbers(e.loss, e.token_accuracy, coefficients.get(d, 0.0)) for d, e in found.items()},
            nonfinite=self.nonfinite, samples_a_step=samples_a_step, tokens_per_second_per_device=tokens_per_second / self.world_size)
        self._start_anew()
        return report
