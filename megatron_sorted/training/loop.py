"""The whole run: build, load, train, evaluate, save, report, stop."""

import dataclasses
import json
import sys
import time
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sorted.checkpoint.candidates import Candidates
from megatron_sorted.checkpoint.manifest import Progress
from megatron_sorted.data.batches import make_train_batches
from megatron_sorted.errors import TrainingError
from megatron_sorted.files import write_text_atomically
from megatron_sorted.model.config import check_platform
from megatron_sorted.monitoring.console import evaluation_lines, step_line
from megatron_sorted.monitoring.json_lines import finite_or_none
from megatron_sorted.monitoring.report import EvaluationReport
from megatron_sorted.monitoring.writers import open_writers
from megatron_sorted.parallel.groups import Place, start_process_groups, stop_process_groups
from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.select import choose_platform
from megatron_sorted.reading.shown import printable
from megatron_sorted.settings.derived import global_batch_size, num_micro_batches, trained_exits
from megatron_sorted.settings.run import Settings
from megatron_sorted.settings.weighting import coefficient_rule
from megatron_sorted.training.adapters import use_ranks
from megatron_sorted.training.build import Model, build_model, build_optimizer
from megatron_sorted.training.checkpoints import Checkpoints, agree_on_run, choose_checkpoint
from megatron_sorted.training.describe import description, evaluation_results, opening_lines
from megatron_sorted.training.evaluate import evaluate
from megatron_sorted.training.failure import report_and_exit
from megatron_sorted.training.forward_step import ForwardStep
from megatron_sorted.training.hugging_face import check_export_of_run, export_last
from megatron_sorted.training.inputs import find_checkpoints, newest_of, open_inputs
from megatron_sorted.training.nonfinite import NonfiniteSteps
from megatron_sorted.training.profile import Profiler
from megatron_sorted.training.reporting import Interval
from megatron_sorted.training.same_run import START, go_on_in_save, start_of
from megatron_sorted.training.signals import stop_request
from megatron_sorted.training.step import StepResult, train_step
from megatron_sorted.training.stops import Stops, leave_word, take_word_back
from megatron_sorted.training.timers import PhaseTimers
from megatron_sorted.training.travelling import own_files
from megatron_sorted.training.watchdog import Watchdog


class Run:
    """One run on this process. Everything that a user can get wrong is checked before process groups start."""

    def __init__(self, settings: Settings):
        self.started = time.monotonic()
        self.inputs = open_inputs(settings)
        self.settings, self.vocab_size = self.inputs.settings, self.inputs.vocab_size
        self.rule = coefficient_rule(self.settings)
        self.progress = Progress(0, 0)
        self.platform: Platform = choose_platform(settings.device)
        check_platform(settings, self.platform)
        self.platform.prepare()

    def start(self) -> None:
        """Joins the other processes, builds the model and loads the checkpoint.

        Collective: creates all groups; every process must call it.
        """
        settings = self.settings
        self.place: Place = start_process_groups(settings, self.platform)
        hang_minutes = settings.hang_timeout_minutes or 0.9 * settings.distributed_timeout_minutes
        self.watchdog = Watchdog(60 * hang_minutes, report_and_exit)
        self.say(*opening_lines(settings, self.platform, self.place, self.vocab_size),
                 *(f"note: {line}" for line in self.inputs.notes))
        if self.inputs.samples is not None:
            self.say(f"training data: {self.inputs.samples.describe()}")
        self.model: Model = build_model(settings, self.platform, self.place, self.vocab_size)
        build_optimizer(self.model, settings, self.place.world_size)
        self.forward_step = ForwardStep(settings, self.model, self.platform)
        self.stops = Stops(settings, self.platform, self.started)
        self.checkpoints = Checkpoints(settings, self.platform, self.place, self.model, self.rule, self.say)
        if settings.save and not settings.skip_train:
            files = own_files(settings, self.inputs.form) if self.place.rank == 0 else {}
            self.checkpoints.open_for_saving(files, self.watchdog.alive)
        self._continue_or_start()
        self.writers = None
        if self.place.rank == 0:
            self.writers = open_writers(settings, self.run_id, self.progress.step, self._description(), self.say)
            if settings.save and not settings.skip_train:
                take_word_back(settings.save)
        self.watchdog.start()

    def _continue_or_start(self) -> None:
        """Load the newest sound checkpoint, if the run is to continue one.

        Collective: every process must call it.
        """
        inputs, candidate = self.inputs, None
        box: list[Any] = [None]
        if self.place.rank == 0:  # again, now that the directory is ours: the run before may have saved since
            box = [self._look_again()]
        dist.broadcast_object_list(box, src=0)
        self.settings, found, start, notes = box[0]
        self.checkpoints.settings = settings = self.settings
        for note in notes:
            self.say(note)
        if settings.load is not None:
            candidate = choose_checkpoint(found or Candidates(), settings, inputs.tokenizer, inputs.data, self.say)
            if candidate is None:
                self.say(f"--load {settings.load} holds no checkpoint: starting afresh")
        self.run_id, self.run_start = agree_on_run(settings, candidate, start)
        if self.place.rank == 0 and settings.save_hf:
            check_export_of_run(settings, self.run_id)
        if candidate is not None:
            self.progress = self.checkpoints.load(candidate)

    def _look_again(self) -> tuple[Settings, Candidates | None, str, list[str]]:
        """Return settings, checkpoints to load, what the run starts from and what to say, as the disk is now; on rank 0."""
        settings, inputs = self.settings, self.inputs
        found = find_checkpoints(settings, inputs.tokenizer, inputs.data)
        start = start_of(settings, newest_of(found))
        resumed, notes = go_on_in_save(settings, newest_of(found), inputs.tokenizer, inputs.data)
        if resumed is not settings:
            found = find_checkpoints(resumed, inputs.tokenizer, inputs.data)
        return resumed, found, start, [*inputs.going_on, *notes]

    def say(self, *lines: str) -> None:
        """Prints on the first process."""
        if self.place.rank == 0:
            print(printable("\n".join(lines)), flush=True)

    def train(self) -> str | None:
        """Trains, reporting, evaluating and saving on the way; returns why it stopped early, or None after the last step.

        Collective: every step's; every process must call it.
        """
        settings, place = self.settings, self.place
        samples_a_step = global_batch_size(settings, place.world_size)
        micro_batches_a_step = num_micro_batches(settings, place.world_size)
        batches = make_train_batches(settings, self.vocab_size, place.data_rank, place.data_size, self.progress.samples,
                                     self.inputs.samples)
        start = self.progress.step
        self.interval = Interval(settings, self.platform, self.model, self.inputs.samples, place.world_size)
        self.model.timers = timers = PhaseTimers(settings.log_timers, self.platform.synchronize)
        directory = settings.profile_dir or (Path(settings.save) / "profile" if settings.save else None)
        profiler = Profiler(settings, place.rank, directory, partial(print, flush=True))
        nonfinite = NonfiniteSteps(settings.nonfinite_steps_allowed)
        if start >= settings.train_iters:
            self.say(f"nothing to train: step {start} of --train-iters {settings.train_iters} is reached")
        profiler.step(start)
        for step in range(start, settings.train_iters):
            done = step + 1
            reports = done % settings.log_interval == 0 or done in (settings.train_iters, start + 1)
            self.forward_step.track_agreement = reports
            coefficients = trained_exits(settings, self.rule, step)
            self.forward_step.begin_step(step, self.rule)
            use_ranks(self.model, settings, step)
            self.watchdog.mark(f"step {done}, data")
            with timers("data"):
                micro_batches = list(islice(batches, micro_batches_a_step))
            self.watchdog.mark(f"step {done}, forward and backward")
            result = train_step(self.model, settings, self.forward_step, micro_batches, coefficients, samples_a_step,
                                lambda: self.stops.ask_around(self.checkpoints.busy))
            self.watchdog.mark(f"step {done}, after the optimizer")
            self.progress = Progress(done, self.progress.samples + samples_a_step)
            if result.observed is not None:
                self.rule.observe(step, result.observed)
            self.interval.add(result, self.forward_step)
            if result.not_finite is None:
                nonfinite.finite()
            else:
                self.say(nonfinite.skipped(done, result.not_finite))
            flags = self.stops.answers()
            if self.checkpoints.saver and not flags.save_busy and (outcome := self.checkpoints.finished(wait=True)):
                self.checkpoints.tell(outcome, last=False)
            if reports:
                self._report(result)
            profiler.step(done)
            if settings.eval_interval and done % settings.eval_interval == 0 and done != settings.train_iters:
                self.evaluate_all()
            if (settings.save and settings.save_interval and done % settings.save_interval == 0 and done != settings.train_iters
                    and not nonfinite.in_a_row):
                self.save()
            if reason := self.stops.reason(flags, done):
                break
        else:
            reason = None
        profiler.close()
        return reason

    def _report(self, result: StepResult) -> None:
        """Collects the numbers since the last report and writes them.

        Collective: two small all-reduces over all ranks.
        """
        with self.model.timers("report"):
            report = self.interval.report(result, self.forward_step, self.progress.step, self.progress.samples)
        report = dataclasses.replace(report, exit_rule=self.rule.numbers())
        self.say(step_line(report))
        if self.writers:
            self.writers.write(report)

    @contextmanager
    def _aside(self):
        """Keeps the time of a block out of the time of steps."""
        began = time.monotonic()
        yield
        if hasattr(self, "interval"):
            self.interval.pause(time.monotonic() - began)

    def evaluate_all(self, last: bool = False) -> list[EvaluationReport]:
        """Returns the reports of all evaluation sets, with those of test sets at the end of training, after writing them.

        Collective: every process must call it.
        """
        reports = []
        with self._aside():
            for name, samples in (self.inputs.eval_sets | (self.inputs.test_sets if last else {})).items():
                self.watchdog.mark(f"step {self.progress.step}, evaluation of {name!r}")
                report = evaluate(self.model, self.settings, self.forward_step, self.place, name, samples, self.progress.step,
                                  self._evaluation_progress(name))
                self.say(evaluation_lines(report))
                if self.writers:
                    self.writers.write(report)
                reports.append(report)
        return reports

    def _evaluation_progress(self, name: str):
        shown = [time.monotonic()]

        def progress(done: int, total: int) -> None:
            self.watchdog.alive()
            if self.place.rank == 0 and time.monotonic() - shown[0] > 10:
                shown[0] = time.monotonic()
                print(f"evaluating {name!r}: batch {done} of {total}", flush=True)

        return progress

    def _description(self) -> dict[str, Any]:
        said = description(self.settings, self.vocab_size, self.run_id, self.place, self.inputs.tokenizer, self.inputs.data)
        return said | ({START: self.run_start} if self.run_start else {})

    def save(self) -> None:
        """Starts a checkpoint; where the run saves in the foreground, writes it.

        Collective: every process must call it.
        """
        self.watchdog.mark(f"step {self.progress.step}, start of a save")
        with self._aside():
            for outcome in self.checkpoints.save(self.progress, self._description()):
                self.checkpoints.tell(outcome, last=False)

    def save_last(self) -> None:
        """Saves the state training ended with, unless it is saved, and waits until it is on disk.

        Collective: every process must call it.

        Raises:
            CheckpointError: It could not be written.
        """
        if self.checkpoints.saver is None:
            return
        self.watchdog.mark(f"step {self.progress.step}, end of the last save")
        if (outcome := self.checkpoints.finished(wait=True)) is not None:
            self.checkpoints.tell(outcome, last=outcome.step == self.progress.step)
        if self.checkpoints.saved_step == self.progress.step or self.progress.step == 0:
            return
        for outcome in [*self.checkpoints.save(self.progress, self._description()), self.checkpoints.finished(wait=True)]:
            if outcome is not None:
                self.checkpoints.tell(outcome, last=True)

    def finish(self) -> None:
        """Saves, evaluates every exit a last time, and leaves the process groups.

        Collective: every process must call it.
        """
        settings = self.settings
        self.save_last()
        reports = self.evaluate_all(last=True)
        if settings.save and self.place.rank == 0 and reports:
            path = Path(settings.save) / "evaluation.json"
            whole = evaluation_results(settings, self.vocab_size, self.progress.step, reports)
            write_text_atomically(path, json.dumps(finite_or_none(whole), indent=1) + "\n")
            self.say(f"wrote {path}")
        self.leave()

    def export(self) -> None:
        """Makes the Hugging Face directory of --save-hf, on the first process; all have left the groups.

        Raises:
            CheckpointError: It could not be written.
        """
        if self.settings.save_hf and self.place.rank == 0:
            export_last(self.settings, self.progress.step, self.run_id, self.say)

    def stop_early(self, reason: str) -> None:
        """Saves what is not saved, leaves word for whoever starts the run again, and leaves the process groups.

        Collective: every process must call it.
        """
        stop_request.ignore_from_now_on()
        self.say(f"stopping at step {self.progress.step} of {self.settings.train_iters}: {reason}")
        self.save_last()
        if self.settings.save and self.place.rank == 0:
            leave_word(self.settings.save, self.progress.step, self.settings.train_iters, reason)
        self.leave()

    def give_up(self) -> None:
        """Lets the save on its way end, which was started when all was well, before the run ends in an error.

        Collective: every process must call it.
        """
        if (outcome := self.checkpoints.finished(wait=True)) is not None:
            self.checkpoints.tell(outcome, last=False)
        if self.writers:
            self.writers.close()

    def leave(self) -> None:
        """Leaves the process groups and gives the directory up.

        Collective: every process must call it.
        """
        self.watchdog.stop()
        if self.writers:
            self.writers.close()
        self.checkpoints.close()
        stop_process_groups()
        sys.stdout.flush()


def run(settings: Settings) -> str | None:
    """Does the whole run; returns why it stopped before its last step, or None if it is done.

    Collective: every process must call it.
    """
    work = Run(settings)
    work.start()
    try:
        reason = None if settings.skip_train else work.train()
    except TrainingError:  # met by all ranks at the same step
        work.give_up()
        raise
    if reason is None:
        work.finish()
        work.export()
    else:
        work.stop_early(reason)
    return reason
