"""The whole run: its steps, and the observers of every step."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from megatron_sorted.checkpoint.manifest import Progress
from megatron_sorted.data.batches import Batch, make_train_batches
from megatron_sorted.errors import TrainingError
from megatron_sorted.settings.derived import global_batch_size, num_micro_batches, trained_exits
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.adapters import use_ranks
from megatron_sorted.training.run.reporting import Every, Interval, Reporter
from megatron_sorted.training.run.start import prepare
from megatron_sorted.training.run.training_run import TrainingRun
from megatron_sorted.training.step.train_step import train_step
from megatron_sorted.training.step_result import Observer, TrainedStep
from megatron_sorted.training.watch.nonfinite import NonfiniteSteps
from megatron_sorted.training.watch.profile import Profiler
from megatron_sorted.training.watch.timers import PhaseTimers


def take_step(run: TrainingRun, batches: Iterator[Batch], reports: bool) -> TrainedStep:
    """Take the next step of a run and return its result.

    Collective: that of ``train_step`` and of the exchange of ``Stops``.

    Args:
        run: The run.
        batches: The micro-batches of this rank.
        reports: Whether the step ends with a report, and so compares the exits.
    """
    settings, model, forward_step = run.settings, run.model, run.forward_step
    step, done = run.progress.step, run.progress.step + 1
    samples = global_batch_size(settings, run.place.world_size)
    forward_step.track_agreement = reports
    coefficients = trained_exits(settings, run.rule, step)
    forward_step.begin_step(step, run.rule)
    use_ranks(model, settings, step)
    run.watchdog.mark(f"step {done}, data")
    with model.timers("data"):
        micro_batches = list(islice(batches, num_micro_batches(settings, run.place.world_size)))
    run.watchdog.mark(f"step {done}, forward and backward")
    result = train_step(
        model,
        settings,
        forward_step,
        micro_batches,
        coefficients,
        samples,
        lambda: run.stops.start_exchange(run.checkpoints.busy),
    )
    run.watchdog.mark(f"step {done}, after the optimizer")
    run.progress = Progress(done, run.progress.samples + samples)
    if result.observed is not None:
        run.rule.observe(step, result.observed)
    is_last, flags = done == settings.train_iters, run.stops.answers()
    return TrainedStep(done, run.progress.samples, result, reports, is_last, flags)


def train(run: TrainingRun) -> str | None:
    """Train, report, evaluate and save; return why it stopped early, or None after the last step.

    Collective: every step's; every process must call it.
    """
    settings, place, start = run.settings, run.place, run.progress.step
    batches = make_train_batches(
        settings,
        run.vocab_size,
        place.data_rank,
        place.data_size,
        run.progress.samples,
        run.inputs.samples,
    )
    interval = Interval(settings, run.platform, run.model, run.inputs.samples, place.world_size)
    run.model.timers = PhaseTimers(settings.log_timers, run.platform.synchronize)
    directory = settings.profile_dir or (Path(settings.save) / "profile" if settings.save else None)
    profiler = Profiler(settings, place.rank, directory, partial(print, flush=True))
    nonfinite = NonfiniteSteps(settings.nonfinite_steps_allowed, run.log)
    save_interval = settings.save_interval if settings.save else None
    observers: tuple[Observer, ...] = (
        nonfinite,
        *([run.average] if run.average is not None else []),
        run.checkpoints,
        Reporter(interval, run.forward_step, run.rule, run.publish),
        profiler,
        Every(settings.eval_interval, run.evaluate_all, interval),
        Every(save_interval, run.save, interval, lambda: nonfinite.in_a_row > 0),
    )
    if start >= settings.train_iters:
        run.log(
            f"nothing to train: step {start} of --train-iters {settings.train_iters} is reached"
        )
    profiler.step(start)
    reason = None
    for done in range(start + 1, settings.train_iters + 1):
        reports = done % settings.log_interval == 0 or done in (settings.train_iters, start + 1)
        step = take_step(run, batches, reports)
        for observer in observers:
            observer.after(step)
        if reason := run.stops.reason(step.flags, done):
            break
    profiler.close()
    return reason


def run(settings: Settings) -> str | None:
    """Do the whole run; return why it stopped before its last step, or None if it is done.

    Collective: every process must call it.
    """
    training_run = TrainingRun(prepare(settings))
    try:
        reason = None if settings.skip_train else train(training_run)
    except TrainingError:  # raised by all ranks at the same step
        training_run.fail()
        raise
    training_run.end(reason)
    return reason
