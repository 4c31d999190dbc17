"""A run on this process: its network, checkpoints and reports, and its end."""

import sys
from dataclasses import replace
from typing import Any

from megatron_sorted.checkpoint.manifest import Progress
from megatron_sorted.data.samples.dataset import EvaluationSet
from megatron_sorted.monitoring.console import evaluation_lines
from megatron_sorted.monitoring.report import EvaluationReport, StepReport
from megatron_sorted.monitoring.writers import open_writers
from megatron_sorted.parallel.groups import start_process_groups, stop_process_groups
from megatron_sorted.platform.versions import copies_note
from megatron_sorted.reading.shown import printable
from megatron_sorted.training.run.averaging import make_average
from megatron_sorted.training.run.carried_files import own_files
from megatron_sorted.training.run.checkpoints import Checkpoints
from megatron_sorted.training.run.describe import description, opening_lines, write_evaluation
from megatron_sorted.training.run.evaluate import Evaluator, ShownProgress
from megatron_sorted.training.run.hugging_face import export_last
from megatron_sorted.training.run.same_run import STARTED_FROM
from megatron_sorted.training.run.start import PreparedRun, find_starting_point
from megatron_sorted.training.step.build import build_model, build_optimizer
from megatron_sorted.training.step.forward_step import ForwardStep
from megatron_sorted.training.watch.failure import report_and_exit
from megatron_sorted.training.watch.signals import stop_request
from megatron_sorted.training.watch.stops import Stops, remove_stop_file, write_stop_file
from megatron_sorted.training.watch.watchdog import Watchdog


class TrainingRun:
    """A run whose processes have met.

    Attributes:
        settings: The settings, with --load set to --save where it resumes from there.
        progress: The steps and samples done.
        writers: The outputs of reports; None on all processes but the first.
    """

    def __init__(self, prepared: PreparedRun):
        """Join the other processes, build the model and load the checkpoint.

        Collective: creates all groups; every process must call it.
        """
        settings, self.inputs = prepared.settings, prepared.inputs
        self.platform, self.rule = prepared.platform, prepared.rule
        self.vocab_size = self.inputs.vocab_size
        self.place = start_process_groups(settings, self.platform)
        hang_minutes = settings.hang_timeout_minutes or 0.9 * settings.distributed_timeout_minutes
        self.watchdog = Watchdog(60 * hang_minutes, report_and_exit)
        self.log(
            *opening_lines(settings, self.platform, self.place, self.vocab_size),
            *(f"note: {line}" for line in (copies_note(), *self.inputs.notes) if line),
        )
        if self.inputs.samples is not None:
            self.log(f"training data: {self.inputs.samples.describe()}")
        self.model = build_model(settings, self.platform, self.place, self.vocab_size)
        build_optimizer(self.model, settings, self.place.world_size)
        self.average = make_average(settings, self.model)
        self.forward_step = ForwardStep(settings, self.model, self.platform)
        self.stops = Stops(settings, self.platform, prepared.started)
        self.checkpoints = Checkpoints(
            settings, self.platform, self.place, self.model, self.rule, self.log, self.average
        )
        saves = settings.save and not settings.skip_train
        if saves:
            files = own_files(settings, self.inputs.form) if self.place.rank == 0 else {}
            self.checkpoints.open_for_saving(files, self.watchdog.alive)
        self.starting_point = find_starting_point(prepared, self.place, self.log)
        self.settings = self.checkpoints.settings = self.starting_point.settings
        candidate = self.starting_point.candidate
        self.progress = Progress(0, 0) if candidate is None else self.checkpoints.load(candidate)
        self.writers = None
        if self.place.rank == 0:
            self.writers = open_writers(
                settings,
                self.starting_point.run_id,
                self.progress.step,
                self._description(),
                self.log,
            )
            if saves:
                remove_stop_file(settings.save)
        self.watchdog.start()

    def log(self, *lines: str) -> None:
        """Print on the first process."""
        if self.place.rank == 0:
            print(printable("\n".join(lines)), flush=True)

    def publish(self, report: StepReport | EvaluationReport, lines: str) -> None:
        """Print the lines of a report and write it, on the first process."""
        self.log(lines)
        if self.writers:
            self.writers.write(report)

    def evaluate_all(self, last: bool = False) -> list[EvaluationReport]:
        """Evaluate all evaluation sets, publish the reports and return them.

        With ``last`` the test sets are evaluated too.

        Collective: every process must call it.
        """
        reports: list[EvaluationReport] = []
        sets = self.inputs.eval_sets | (self.inputs.test_sets if last else {})
        for name, samples in sets.items():
            self.watchdog.mark(f"step {self.progress.step}, evaluation of {name!r}")
            reports.append(self._evaluate(name, samples))
            self.publish(reports[-1], evaluation_lines(reports[-1]))
        return reports

    def _evaluate(self, name: str, samples: EvaluationSet) -> EvaluationReport:
        """Return the report of one set, on averaged weights too if that is asked for.

        Collective: those of the evaluations, and of ``WeightAverage.in_place``.
        """

        def evaluate(shown_name: str) -> EvaluationReport:
            evaluation = Evaluator(
                self.settings, self.model, self.platform, self.place, name, samples
            )
            shown = ShownProgress(shown_name, self.watchdog.alive, self.place.rank == 0)
            return evaluation.run(self.progress.step, shown)

        report = evaluate(name)
        if not self.settings.evaluate_averaged or self.average is None:
            return report
        if not self.average.has_begun:
            return report
        self.watchdog.mark(f"step {self.progress.step}, evaluation of {name!r}, averaged weights")
        with self.average.in_place():
            averaged = evaluate(f"{name}, averaged weights")
        return replace(report, averaged=averaged.exits, seconds=report.seconds + averaged.seconds)

    def _description(self) -> dict[str, Any]:
        start = self.starting_point
        described = description(
            self.settings,
            self.vocab_size,
            start.run_id,
            self.place,
            self.inputs.tokenizer,
            self.inputs.data,
        )
        return described | ({STARTED_FROM: start.origin} if start.origin else {})

    def save(self) -> None:
        """Save a checkpoint, or start to save it in the background.

        Collective: every process must call it.
        """
        self.watchdog.mark(f"step {self.progress.step}, start of a save")
        for outcome in self.checkpoints.save(self.progress, self._description()):
            self.checkpoints.report(outcome, last=False)

    def end(self, reason: str | None = None) -> None:
        """End the run after its last step, or early for a ``reason``.

        Collective: every process must call it.

        Raises:
            CheckpointError: The state, or the directory of --save-hf, could not be written.
        """
        settings, step = self.settings, self.progress.step
        if reason is not None:
            stop_request.ignore_from_now_on()
            self.log(f"stopping at step {step} of {settings.train_iters}: {reason}")
        if self.checkpoints.saver is not None:
            self.watchdog.mark(f"step {step}, end of the last save")
            self.checkpoints.end(self.progress, self._description())
        if reason is None:
            reports = self.evaluate_all(last=True)
            if settings.save and self.place.rank == 0 and reports:
                self.log(f"wrote {write_evaluation(settings, self.vocab_size, step, reports)}")
        elif settings.save and self.place.rank == 0:
            write_stop_file(settings.save, step, settings.train_iters, reason)
        self.leave()
        if reason is None and settings.save_hf and self.place.rank == 0:
            export_last(settings, step, self.starting_point.run_id, self.log)

    def fail(self) -> None:
        """Finish a save that was started before the error with which the run ends.

        Collective: every process must call it.
        """
        if (outcome := self.checkpoints.finished(wait=True)) is not None:
            self.checkpoints.report(outcome, last=False)
        if self.writers:
            self.writers.close()

    def leave(self) -> None:
        """Leave the process groups and release the directory of checkpoints.

        Collective: every process must call it.
        """
        self.watchdog.stop()
        if self.writers:
            self.writers.close()
        self.checkpoints.close()
        stop_process_groups()
        sys.stdout.flush()
