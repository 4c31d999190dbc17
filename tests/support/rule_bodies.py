"""The work of the processes in tests/ranks/test_learned_rules.py: training with a learned rule."""

import dataclasses
from pathlib import Path

from megatron_sorted.checkpoint.candidates import find_candidates
from megatron_sorted.checkpoint.manifest import Progress
from megatron_sorted.parallel.groups import start_process_groups
from megatron_sorted.platform.select import choose_platform
from megatron_sorted.settings.coefficient_rule import coefficient_rule
from megatron_sorted.settings.derived import trained_exits
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.checkpoints import Checkpoints, choose_checkpoint
from megatron_sorted.training.run.describe import description
from megatron_sorted.training.step.build import build_model, build_optimizer, unwrap
from megatron_sorted.training.step.forward_step import ForwardStep
from megatron_sorted.training.step.reduce import reduce_ledger
from megatron_sorted.training.step.train_step import train_step
from tests.support.gather import shards_of
from tests.support.measure_bodies import CollectiveCount
from tests.support.tiny import init_method, make_samples, micro_batches


def train_each(runs: dict[str, tuple], settings: Settings) -> dict[str, dict]:
    """Return ``train_with_rule`` of several runs by name, all in the layout of ``settings``.

    The processes join their groups only once.
    """
    platform = choose_platform(settings.device)
    platform.prepare()
    place = start_process_groups(settings, platform, init_method())
    return {name: train_with_rule(platform, place, *arguments) for name, arguments in runs.items()}


def train_with_rule(
    platform,
    place,
    settings: Settings,
    first: int,
    last: int,
    load: str | None = None,
    save: str | None = None,
    poisoned_step: int | None = None,
) -> dict:
    """Load if asked, train steps first..last-1, save if asked; report each step, and weights.

    A step's report has losses, coefficients and observations.

    At ``poisoned_step`` the loss of the last exit is NaN on the first rank that has it.
    """
    model = build_model(settings, platform, place, settings.vocab_size)
    build_optimizer(model, settings, place.world_size)
    tied = not settings.untie_embeddings_and_output_weights
    rule, logged = coefficient_rule(settings), []
    report = {
        "initial": shards_of(model, unwrap, lambda p: p.data, place.tensor_rank, tied),
        "losses": [],
        "coefficients": [],
        "observed": [],
        "collectives": [],
        "stepped": [],
    }
    checkpoints = Checkpoints(
        dataclasses.replace(settings, load=load, save=save),
        platform,
        place,
        model,
        rule,
        logged.append,
    )
    if load:
        checkpoints.load(
            choose_checkpoint(
                find_candidates(load), checkpoints.settings, None, None, logged.append
            )
        )
    forward_step = ForwardStep(settings, model, platform)
    honest = forward_step.losses.compute
    for step in range(first, last):

        def exit_loss(micro, depth, hidden, factor, step=step):
            losses, gradient = honest(micro, depth, hidden, factor)
            if step == poisoned_step and depth == settings.num_layers and place.data_rank == 0:
                losses.loss_n[0] = float("nan")
            return losses, gradient

        forward_step.losses.compute = exit_loss
        coefficients = trained_exits(settings, rule, step)
        forward_step.begin_step(step, rule)
        samples = make_samples(
            settings.global_batch_size, settings.seq_length, 100 + step, True, True
        )
        batches = micro_batches(samples, settings, place.data_rank, place.data_size, True)
        with CollectiveCount() as collectives:
            result = train_step(
                model, settings, forward_step, batches, coefficients, settings.global_batch_size
            )
        if result.observed is not None:
            rule.observe(step, result.observed)
        report["stepped"].append(result.stepped)
        report["collectives"].append(collectives.counts)
        report["coefficients"].append(coefficients)
        report["observed"].append(result.observed)
        report["losses"].append(
            {d: e.loss for d, e in reduce_ledger(forward_step.ledger, settings).exits.items()}
        )
    if save:
        Path(save).mkdir(exist_ok=True)
        checkpoints.open_for_saving({}, lambda: None)
        checkpoints.save(
            Progress(last, last * settings.global_batch_size),
            description(settings, settings.vocab_size, "test", place, None, None),
        )
        checkpoints.finished(wait=True)
        checkpoints.close()
    report["state"], report["next"] = rule.state_dict(), trained_exits(settings, rule, last)
    report["weights"] = shards_of(model, unwrap, lambda p: p.data, place.tensor_rank, tied)
    return report
