"""The whole run: build, load, train, evaluate, save, report."""

import json
import sys
import time
from itertools import islice
from pathlib import Path

from megatron_sorted.checkpoint.layout import Progress, latest_checkpoint, write_text_atomically
from megatron_sorted.checkpoint.sharded import load_checkpoint, save_checkpoint
from megatron_sorted.data.batches import make_train_batches
from megatron_sorted.model.config import check_platform
from megatron_sorted.monitoring.console import duration, evaluation_lines, step_line
from megatron_sorted.monitoring.json_lines import JsonLines, finite_or_none
from megatron_sorted.monitoring.report import EvaluationReport, ExitNumbers, StepReport
from megatron_sorted.parallel.groups import Place, start_process_groups, stop_process_groups
from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.select import choose_platform
from megatron_sorted.settings.derived import coefficient_rule, global_batch_size, num_micro_batches, trained_exits
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.build import Model, build_model, build_optimizer
from megatron_sorted.training.describe import description, evaluation_results, opening_lines
from megatron_sorted.training.evaluate import evaluate
from megatron_sorted.training.forward_step import ForwardStep
from megatron_sorted.training.inputs import open_inputs
from megatron_sorted.training.reduce import reduce_ledger
from megatron_sorted.training.step import train_step


class Run:
    """One run on this process. Everything that a user can get wrong is checked before process groups start."""

    def __init__(self, settings: Settings):
        self.inputs = open_inputs(settings)
        self.settings, self.vocab_size = self.inputs.settings, self.inputs.vocab_size
        self.rule = coefficient_rule(self.settings)
        self.progress, self.trained = Progress(0, 0), False
        self.platform: Platform = choose_platform(settings.device)
        check_platform(settings, self.platform)
        self.platform.prepare()

    def start(self) -> None:
        """Joins the other processes, builds the model and loads the checkpoint.

        Collective: creates all groups; every process must call it.
        """
        settings = self.settings
        self.place: Place = start_process_groups(settings, self.platform)
        self.say(*opening_lines(settings, self.platform, self.place, self.vocab_size))
        if self.inputs.samples is not None:
            self.say(f"training data: {self.inputs.samples.describe()}")
        self.model: Model = build_model(settings, self.platform, self.place, self.vocab_size)
        build_optimizer(self.model, settings, self.place.world_size)
        self.forward_step = ForwardStep(settings, self.model, self.platform)
        path = settings.metrics_file or (str(Path(settings.save) / "metrics.jsonl") if settings.save else None)
        self.json_lines = JsonLines(path) if path and self.place.rank == 0 else None
        if self.json_lines:
            self.json_lines.start()
        if self.inputs.checkpoint is not None:
            self._load(self.inputs.checkpoint)
        elif settings.load is not None:
            self.say(f"--load {settings.load} holds no checkpoint: starting afresh")
        if settings.save and settings.save != settings.load and not settings.skip_train and (older := latest_checkpoint(settings.save)):
            self.say(f"note: --save {settings.save} holds checkpoints up to {older.name} of an earlier run; this one goes on from step "
                     f"{self.progress.step} and replaces those it reaches")

    def _load(self, directory: Path) -> None:
        settings = self.settings
        whole = not settings.finetune and not settings.skip_train
        progress, more = load_checkpoint(
            directory, self.model.chunks, self.model.optimizer, self.model.schedule,
            load_optimizer=whole and not settings.no_load_optim, load_random=whole and not settings.no_load_rng)
        if not settings.finetune:
            self.progress = progress
            self.rule.load_state_dict(more.get("coefficient_rule", {}))
        rate = self.model.optimizer.param_groups[0]["lr"]
        self.say(f"loaded {directory}: " + ("weights only, starting at step 0" if settings.finetune else
                 f"step {progress.step}, {progress.samples} samples consumed, learning rate {rate:.3e}"))

    def say(self, *lines: str) -> None:
        """Prints on the first process."""
        if self.place.rank == 0:
            print("\n".join(lines), flush=True)

    def train(self) -> None:
        """Trains to the last step, reporting, evaluating and saving on the way.

        Collective: every step's; every process must call it.
        """
        settings, place = self.settings, self.place
        samples_a_step = global_batch_size(settings, place.world_size)
        micro_batches_a_step = num_micro_batches(settings, place.world_size)
        batches = make_train_batches(settings, self.vocab_size, place.data_rank, place.data_size, self.progress.samples,
                                     self.inputs.samples)
        start = first = self.progress.step
        since, skipped = time.monotonic(), 0
        rates: list[float] = []
        if start >= settings.train_iters:
            self.say(f"nothing to train: step {start} of --train-iters {settings.train_iters} is reached")
        for step in range(self.progress.step, settings.train_iters):
            coefficients = trained_exits(settings, self.rule, step)
            result = train_step(
                self.model, settings, self.forward_step, list(islice(batches, micro_batches_a_step)), coefficients, samples_a_step)
            skipped += not result.stepped
            self.progress, self.trained = Progress(step + 1, self.progress.samples + samples_a_step), True
            done = step + 1
            if done % settings.log_interval == 0 or done == settings.train_iters or done == start + 1:
                self.platform.synchronize()
                rates.append((time.monotonic() - since) / max(done - first, 1))
                self._report(done, result.grad_norm, skipped, rates, coefficients)
                since, first, skipped = time.monotonic(), done, 0
            if settings.eval_interval and done % settings.eval_interval == 0 and done != settings.train_iters:
                self.evaluate_all()
                since, first = time.monotonic(), done
            if settings.save and settings.save_interval and done % settings.save_interval == 0 and done != settings.train_iters:
                self.save()
                since, first = time.monotonic(), done

    def _report(self, done: int, grad_norm: float, skipped: int, rates: list[float], coefficients: dict[int, float]) -> None:
        """Collects the numbers since the last report and writes them.

        Collective: one small all-reduce over all ranks.
        """
        settings = self.settings
        found = reduce_ledger(self.forward_step.ledger, settings)
        self.forward_step.ledger.clear()
        # the first step also warms up caches and allocators: it says nothing of the time left
        usual = rates[-1] if len(rates) < 3 else sorted(rates[1:])[len(rates[1:]) // 2]
        report = StepReport(
            step=done, total_steps=settings.train_iters, samples=self.progress.samples,
            learning_rate=self.model.optimizer.param_groups[0]["lr"], grad_norm=grad_norm,
            loss_scale=float(self.model.optimizer.get_loss_scale()), skipped=skipped, step_seconds=rates[-1],
            tokens_per_second=global_batch_size(settings, self.place.world_size) * settings.seq_length / rates[-1],
            seconds_left=usual * (settings.train_iters - done),
            exits={d: ExitNumbers(e.loss, e.token_accuracy, coefficients.get(d, 0.0)) for d, e in found.items()})
        self.say(step_line(report))
        if self.json_lines:
            self.json_lines.write(report)

    def evaluate_all(self) -> list[EvaluationReport]:
        """Returns the reports of all evaluation sets, after writing them.

        Collective: every process must call it.
        """
        reports = []
        for name, samples in self.inputs.eval_sets.items():
            report = evaluate(self.model, self.settings, self.forward_step, self.place, name, samples, self.progress.step,
                              self._evaluation_progress(name))
            self.say(evaluation_lines(report))
            if self.json_lines:
                self.json_lines.write(report)
            reports.append(report)
        return reports

    def _evaluation_progress(self, name: str):
        shown = [time.monotonic()]

        def progress(done: int, total: int) -> None:
            if self.place.rank == 0 and time.monotonic() - shown[0] > 10:
                shown[0] = time.monotonic()
                print(f"evaluating {name!r}: batch {done} of {total}", flush=True)

        return progress

    def save(self) -> None:
        """Writes a checkpoint.

        Collective: every process must call it.
        """
        started = time.monotonic()
        directory = save_checkpoint(
            self.settings.save, self.model.chunks, self.model.optimizer, self.model.schedule, self.progress,
            description(self.settings, self.vocab_size), {"coefficient_rule": self.rule.state_dict()})
        self.say(f"saved {directory} in {duration(time.monotonic() - started)}")

    def finish(self) -> None:
        """Saves, evaluates every exit a last time, and leaves the process groups.

        Collective: every process must call it.
        """
        settings = self.settings
        if settings.save and self.trained:
            self.save()
        reports = self.evaluate_all()
        if settings.save and self.place.rank == 0 and reports:
            path = Path(settings.save) / "evaluation.json"
            whole = evaluation_results(settings, self.vocab_size, self.progress.step, reports)
            write_text_atomically(path, json.dumps(finite_or_none(whole), indent=1) + "\n")
            self.say(f"wrote {path}")
        stop_process_groups()


def run(settings: Settings) -> None:
    """Does the whole run.

    Collective: every process must call it.
    """
    work = Run(settings)
    work.start()
    if not settings.skip_train:
        work.train()
    work.finish()
    sys.stdout.flush()
