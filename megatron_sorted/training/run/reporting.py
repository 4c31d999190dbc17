"""The steps since the last report, and the report of them."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from megatron_sorted.data.samples.sample import SampleSource
from megatron_sorted.exits.coefficients import CoefficientRule
from megatron_sorted.loss.ledger import Ledger
from megatron_sorted.monitoring.console import step_line
from megatron_sorted.monitoring.report import StepReport
from megatron_sorted.platform.contract import Platform
from megatron_sorted.settings.derived import global_batch_size
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.throughput import (
    device_peak_tflops,
    model_flops_utilisation,
    step_flops,
    tflops_per_device,
)
from megatron_sorted.training.step.build import Model
from megatron_sorted.training.step.forward_step import ForwardStep
from megatron_sorted.training.step.reduce import reduce_interval
from megatron_sorted.training.step_result import StepResult, TrainedStep

# Number of past reports from which the time left is estimated.
RECENT_REPORTS = 100


class Interval:
    """The steps since the last report.

    A step that was skipped for a number that is not finite leaves nothing in the means.

    Args:
        settings: The run.
        platform: The devices of the run.
        model: The model, for learning rate and loss scale.
        samples: The training samples.
        world_size: Number of ranks.
    """

    def __init__(
        self,
        settings: Settings,
        platform: Platform,
        model: Model,
        samples: SampleSource,
        world_size: int,
    ):
        self.settings, self.platform, self.model = settings, platform, model
        self.samples, self.world_size = samples, world_size
        self.samples_a_step = global_batch_size(settings, world_size)
        self.peak_tflops = device_peak_tflops(settings, platform)
        self.ledger = Ledger()
        self.rates: list[float] = []
        self._start_anew()

    def _start_anew(self) -> None:
        self.ledger.clear()
        self.steps = self.skipped = self.nonfinite = self.flops = 0
        self._since, self._paused = time.monotonic(), 0.0

    def add(self, result: StepResult, forward_step: ForwardStep) -> None:
        """Add one step."""
        self.steps += 1
        self.skipped += not result.stepped
        self.nonfinite += result.not_finite is not None
        self.flops += step_flops(
            self.settings,
            self.model.vocab_size,
            self.world_size,
            forward_step.coefficients,
            self.model.teacher and self.model.teacher.settings,
        )
        if result.not_finite is None:
            if not result.stepped:
                forward_step.ledger.drop_gradients()
            self.ledger.merge(forward_step.ledger)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of a block that takes no steps: evaluation, the start of a save."""
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began

    def report(
        self, result: StepResult, forward_step: ForwardStep, step: int, samples: int
    ) -> StepReport:
        """Return the report of the steps added, and start anew.

        Collective: two small all-reduces over all ranks. The host waits for the device.

        Args:
            result: The result of the last step.
            forward_step: The forward step, with the coefficients of the last step.
            step: Number of steps done.
            samples: Number of samples consumed.
        """
        settings, optimizer = self.settings, self.model.optimizer
        summed = reduce_interval(
            self.ledger,
            settings,
            forward_step.take_checksum(),
            self.platform.peak_memory_bytes(),
            self.model.timers.take(self.steps),
        )
        seconds = time.monotonic() - self._since - self._paused
        self.rates = [*self.rates[-RECENT_REPORTS:], seconds / max(self.steps, 1)]
        # the first step also warms up caches and allocators, so it does not count for the time left
        typical = self.rates[-1] if len(self.rates) < 3 else statistics.median(self.rates[1:])
        tokens_per_second = self.samples_a_step * settings.seq_length / self.rates[-1]
        tflops = tflops_per_device(self.flops, seconds, self.world_size)
        report = StepReport(
            step=step,
            total_steps=settings.train_iters,
            samples=samples,
            learning_rate=optimizer.param_groups[0]["lr"],
            grad_norm=result.grad_norm,
            loss_scale=float(optimizer.get_loss_scale()),
            skipped=self.skipped,
            step_seconds=self.rates[-1],
            tokens_per_second=tokens_per_second,
            seconds_left=typical * (settings.train_iters - step),
            exits={
                depth: replace(numbers, coefficient=forward_step.coefficients.get(depth, 0.0))
                for depth, numbers in summed.exits.items()
            },
            nonfinite=self.nonfinite,
            samples_a_step=self.samples_a_step,
            epoch=self.samples.epoch_at(samples),
            data_checksum=summed.checksum,
            tokens_per_second_per_device=tokens_per_second / self.world_size,
            tflops_per_device=tflops,
            mfu=model_flops_utilisation(tflops, self.peak_tflops),
            memory_bytes=summed.memory_bytes,
            phases=summed.phases,
        )
        self._start_anew()
        return report


@dataclass
class Reporter:
    """An observer that adds every step, and publishes the report of an interval at its end.

    Attributes:
        interval: The steps since the last report.
        forward_step: The forward step, with ledger and coefficients of the current step.
        rule: The coefficient rule, for the numbers it reports.
        publish: A function that takes a report and its lines for the console.
    """

    interval: Interval
    forward_step: ForwardStep
    rule: CoefficientRule
    publish: Callable[[StepReport, str], None]

    def after(self, step: TrainedStep) -> None:
        """Add a step; publish a report if the step ends with one.

        Collective: for a report two small all-reduces over all ranks.
        """
        self.interval.add(step.result, self.forward_step)
        if not step.reports:
            return
        with self.interval.model.timers("report"):
            report = self.interval.report(step.result, self.forward_step, step.number, step.samples)
        report = replace(report, exit_rule=self.rule.numbers())
        self.publish(report, step_line(report))


@dataclass
class Every:
    """An observer that repeats an action every few steps.

    It does nothing after the last step, where the end of the run does the same.

    Attributes:
        steps: Number of steps from one action to the next; None or 0 for never.
        action: The action; its time is left out of the interval.
        interval: The steps since the last report.
        unless: A function that returns whether to skip the action this time.
    """

    steps: int | None
    action: Callable[[], object]
    interval: Interval
    unless: Callable[[], bool] = lambda: False

    def after(self, step: TrainedStep) -> None:
        """Do the action if it is due.

        Collective: that of ``action``.
        """
        if self.steps and step.number % self.steps == 0 and not step.is_last and not self.unless():
            with self.interval.paused():
                self.action()
