"""The work of the processes in tests/ranks/test_measures.py and test_host_waits.py."""

import dataclasses
import os

import torch
import torch.distributed as dist

from megatron_sorted.loss.cross_entropy import CrossEntropy, LossRequest, VocabularyShard
from megatron_sorted.loss.ledger import Ledger
from megatron_sorted.loss.linear_cross_entropy import exit_loss
from megatron_sorted.settings.coefficient_rule import coefficient_rule
from megatron_sorted.settings.derived import trained_exits
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step.build import unwrap
from megatron_sorted.training.step.forward_step import ForwardStep
from megatron_sorted.training.step.reduce import reduce_interval
from megatron_sorted.training.step.train_step import train_step
from tests.support.gather import shards_of
from tests.support.host_waits import HostWaits, MarkedPlatform
from tests.support.loss_case import make_case
from tests.support.rank_bodies import start
from tests.support.tiny import init_method, make_samples, micro_batches


class CollectiveCount:
    """A counter of calls to the collective functions of torch.distributed, made inside it."""

    # isend and irecv are left alone: torch compares them with the functions it knows
    NAMES = (
        "all_reduce",
        "broadcast",
        "all_gather",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "batch_isend_irecv",
    )

    def __enter__(self) -> "CollectiveCount":
        self.counts = dict.fromkeys(self.NAMES, 0)
        self._kept = {name: getattr(dist, name) for name in self.NAMES}
        for name, function in self._kept.items():
            setattr(dist, name, self._counted(name, function))
        return self

    def _counted(self, name, function):
        def call(*args, **kwargs):
            self.counts[name] += 1
            return function(*args, **kwargs)

        return call

    def __exit__(self, *_) -> None:
        for name, function in self._kept.items():
            setattr(dist, name, function)


def batch_checksum(tokens_bs: torch.Tensor) -> int:
    """Return a micro-batch's checksum, the sum of those of its samples."""
    return sum((int(row.sum()) + 1) * 123_456_789 for row in tokens_bs)


def measure(
    settings: Settings,
    steps: int,
    unequal: bool,
    packed: bool,
    track: bool = True,
    finish: bool = True,
) -> dict:
    """Train; return measures of exits by step and over all, weights and collective counts.

    The weights are those before each step. ``finish`` False leaves out all that ``finish_step``
    does.
    """
    platform, place, model = start(settings)
    tied = not settings.untie_embeddings_and_output_weights
    forward_step = ForwardStep(settings, model, platform, track_agreement=track)
    if not finish:
        forward_step.finish_step = lambda: None
    rule, interval = coefficient_rule(settings), Ledger()
    report = {"steps": [], "weights": [], "coefficients": [], "collectives": [], "bad": []}

    def gather_weights() -> None:
        """Gather the weights now, which overlapped gathering would do in the next forward pass."""
        for chunk in model.chunks if settings.overlap_param_gather else ():
            chunk.start_param_sync(force_sync=True)

    for step in range(steps):
        gather_weights()
        report["weights"].append(
            shards_of(model, unwrap, lambda p: p.data, place.tensor_rank, tied)
        )
        samples = make_samples(
            settings.global_batch_size, settings.seq_length, 100 + step, unequal, packed
        )
        batches = [
            dataclasses.replace(batch, checksum=batch_checksum(batch.tokens_bs))
            for batch in micro_batches(samples, settings, place.data_rank, place.data_size, packed)
        ]
        coefficients = trained_exits(settings, rule, step)
        with CollectiveCount() as collectives:
            train_step(
                model, settings, forward_step, batches, coefficients, settings.global_batch_size
            )
        report["collectives"].append(collectives.counts)
        report["coefficients"].append(coefficients)
        ledger = forward_step.ledger
        report["bad"].append((ledger.bad_exits(), ledger.bad_flag(platform.device()).item()))
        report["steps"].append(
            reduce_interval(
                ledger,
                settings,
                forward_step.take_checksum(),
                1000 + place.rank,
                {"data": float(place.rank), "optimizer": 5.0 - place.rank} if step else None,
            )
        )
        interval.merge(ledger)
        ledger.clear()
    report["interval"] = reduce_interval(interval, settings)
    gather_weights()
    report["final"] = shards_of(model, unwrap, lambda p: p.data, place.tensor_rank, tied)
    return report


def broken_exit(settings: Settings, depth: int) -> dict:
    """Return the ledger's flags of a step in which the head at ``depth`` is NaN, and the stage."""
    platform, place, model = start(settings)
    for chunk in model.chunks:
        for name, parameter in unwrap(chunk).named_parameters():
            if name == f"exit_output_layers.{depth}.weight":
                parameter.data.fill_(float("nan"))
    forward_step = ForwardStep(settings, model, platform)
    samples = make_samples(settings.global_batch_size, settings.seq_length, 5)
    batches = micro_batches(samples, settings, place.data_rank, place.data_size)
    coefficients = trained_exits(settings, coefficient_rule(settings), 0)
    train_step(model, settings, forward_step, batches, coefficients, settings.global_batch_size)
    ledger = forward_step.ledger
    return {
        "stage": place.stage,
        "bad": ledger.bad_exits(),
        "flag": ledger.bad_flag(platform.device()).item(),
    }


def host_waits(settings: Settings, track: bool, packed: bool) -> dict:
    """Return where the host would wait for a device, in a step and in a report.

    Waits in a step are listed for megatron_sorted and for other packages.
    """
    _, place, model = start(settings)
    waits = HostWaits()
    for chunk in model.chunks:
        waits.mark(
            *(p.data for p in chunk.parameters()),
            *(p.main_grad for p in chunk.parameters() if p.requires_grad),
        )
    forward_step = ForwardStep(settings, model, MarkedPlatform(waits), track_agreement=track)
    samples = make_samples(settings.global_batch_size, settings.seq_length, 100, packed, packed)
    batches = micro_batches(samples, settings, place.data_rank, place.data_size, packed)
    rule = coefficient_rule(settings)
    coefficients = trained_exits(settings, rule, 0)
    forward_step.begin_step(0, rule)
    train_step(
        model, settings, forward_step, batches, coefficients, settings.global_batch_size
    )  # caches fill
    forward_step.ledger.clear()
    with waits:
        forward_step.begin_step(1, rule)
        train_step(model, settings, forward_step, batches, coefficients, settings.global_batch_size)
        flag = forward_step.ledger.bad_flag(forward_step.device)
    step, others = list(waits.ours), list(waits.megatrons)
    waits.ours.clear()
    with waits:
        reduce_interval(forward_step.ledger, settings)
        bool(flag)
        forward_step.ledger.bad_exits()
    return {"step": step, "megatron": others, "report": list(waits.ours)}


def shared_choice(rows: int, vocabulary: int, alike_from: int) -> list[int]:
    """Return the most likely tokens over ranks that each hold ``rows`` rows of one output matrix.

    Rows from ``alike_from`` on are alike, and rows before it are 0.
    """
    dist.init_process_group(
        "gloo",
        init_method=init_method(),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    first = rows * dist.get_rank()
    case = make_case(rows=rows * dist.get_world_size(), vocabulary=vocabulary)
    case.weight_ph.data[:alike_from], case.weight_ph.data[alike_from:] = (
        0,
        case.weight_ph.data[alike_from].clone(),
    )
    weight = torch.nn.Parameter(case.weight_ph.data[first : first + rows].clone())
    shard = VocabularyShard(first, max(0, min(rows, vocabulary - first)), dist.group.WORLD)
    token_loss = CrossEntropy(LossRequest(case.targets, shard, 4, with_choice=True))
    return exit_loss(case.hidden_tbh, case.norm, weight, token_loss)[0].choice_n.tolist()
