"""Dry runs: ranks of a layout are built and stepped without devices and compared with the plan.

A process that has done this cannot do anything else.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch

from megatron_sorted.data.batches import Batch
from megatron_sorted.dry_run.counting import Counter, Message
from megatron_sorted.parallel.groups import Place, start_process_groups, stop_process_groups
from megatron_sorted.planning.estimate import Plan
from megatron_sorted.planning.messages import messages_of_stage
from megatron_sorted.planning.operations import operations_of_chunk
from megatron_sorted.planning.work import work_of_chunks
from megatron_sorted.platform.meta import MetaPlatform, pretended_world
from megatron_sorted.settings.derived import num_micro_batches
from megatron_sorted.settings.layout import vocabulary_rows
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step.build import Model, build_model
from megatron_sorted.training.step.forward_step import ForwardStep
from megatron_sorted.training.step.train_step import run_schedule

SHORT_STEP = 2
"""Micro-batches per stage in a shortened step, which has every pass of the schedule."""

PADDING = 0.01
"""The share of a collective's bytes by which buffers may be padded."""
SCALARS = 1024
"""Bytes of single numbers that are summed in a step, such as that of trained tokens."""


@dataclass
class MeasuredRank:
    """One rank of a dry run.

    Attributes:
        place: The rank's place in the layout.
        parameters, planned_parameters: Number of parameters, counted and planned.
        shapes: Shape and dtype of every parameter, by name.
        flops, planned_flops: Operations of a step, counted and planned; None if not stepped, since
            another rank does the same work.
        collectives, planned_collectives: Bytes that this rank sends in collectives of a step, up to
            the optimizer, by kind of group.
        sent, received: Messages in order, by the other rank.
    """

    place: Place
    parameters: int
    planned_parameters: int
    shapes: dict[str, tuple] = field(repr=False)
    flops: int | None = None
    planned_flops: int = 0
    collectives: dict[str, float] = field(default_factory=dict)
    planned_collectives: dict[str, float] = field(default_factory=dict)
    sent: dict[int, list[Message]] = field(default_factory=dict, repr=False)
    received: dict[int, list[Message]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class DryRun:
    """The result of a dry run.

    Attributes:
        ranks: The ranks that were built.
        micro_batches: Number of micro-batches in a step.
        messages: Number of messages compared between pairs of ranks that were both stepped.
        problems: Differences from the plan or between ranks; empty without any.
    """

    ranks: dict[int, MeasuredRank]
    micro_batches: int
    messages: int
    problems: list[str]


def shapes_of_model(model: Model) -> dict[str, tuple]:
    """Return the shape and dtype of all parameters of a rank, by name."""
    return {
        f"{number}.{name}": (tuple(p.shape), str(p.dtype))
        for number, chunk in enumerate(model.chunks)
        for name, p in chunk.named_parameters()
    }


def _count_step(
    settings: Settings, model: Model, platform: MetaPlatform, micro_batches: int
) -> Counter:
    """Count forward and backward of ``micro_batches``, and the reduction of their gradients.

    Collective: the schedule's; no other process takes part.
    """
    forward_step = ForwardStep(settings, model, platform)
    forward_step.coefficients = {
        depth: 1.0 for chunk in work_of_chunks(settings) for depth in chunk.trained
    }
    shape = (settings.micro_batch_size, settings.seq_length)
    tokens = torch.zeros(shape, dtype=torch.long)
    batch = Batch(
        tokens, tokens, torch.ones(shape), None, torch.arange(settings.seq_length).expand(shape)
    )
    with Counter() as counter:
        run_schedule(model, settings, forward_step, [batch] * micro_batches, forward_only=False)
    return counter


def by_kind_of_group(
    settings: Settings, world_size: int, collective_bytes: dict[tuple[tuple[int, ...], bool], float]
) -> dict[str, float]:
    """Return the bytes of a counter's collectives by the kind of their groups.

    Groups share layers ("tensor"), copies of norms and heads on several stages ("copies"), or a
    stage, whose data parallel ranks sum "gradients" and gather the updated "parameters".
    """
    of_copy = settings.tensor_model_parallel_size
    of_stage = world_size // settings.pipeline_model_parallel_size
    kinds = {"tensor": 0.0, "gradients": 0.0, "parameters": 0.0, "copies": 0.0}
    for (ranks, gathered), size in collective_bytes.items():
        kind = "copies"
        if len({rank // of_copy for rank in ranks}) == 1:
            kind = "tensor"
        elif len({rank // of_stage for rank in ranks}) == 1:
            kind = "parameters" if gathered else "gradients"
        kinds[kind] += size
    return kinds


def measure_rank(
    settings: Settings,
    vocab_size: int,
    rank: int,
    world_size: int,
    plan: Plan,
    platform: MetaPlatform,
    micro_batches: int | None,
) -> MeasuredRank:
    """Build one rank, step it if ``micro_batches`` is given, and return its counts.

    Collective: groups of the pretended world.
    """
    with pretended_world(rank, world_size):
        place = start_process_groups(settings, platform)
        model = build_model(settings, platform, place, vocab_size)
        stage = plan.stages[place.stage]
        count = sum(p.numel() for chunk in model.chunks for p in chunk.parameters())
        planned_parameters = sum(stage.parameters.values())
        measured = MeasuredRank(place, count, planned_parameters, shapes_of_model(model))
        if micro_batches is not None:
            counter = _count_step(settings, model, platform, micro_batches)
            measured.flops = counter.flops
            measured.sent, measured.received = counter.sent, counter.received
            measured.planned_flops = micro_batches * sum(
                operations_of_chunk(settings, chunk, vocab_size, place.tensor_rank).total
                for chunk in stage.chunks
            )
            kinds = by_kind_of_group(settings, world_size, counter.collective_bytes)
            measured.collectives = kinds
            samples = micro_batches * settings.micro_batch_size * place.data_size
            planned = messages_of_stage(
                replace(settings, global_batch_size=samples),
                work_of_chunks(settings),
                place.stage,
                vocab_size,
                world_size,
            )
            measured.planned_collectives = {kind: getattr(planned, kind) for kind in kinds}
            if not settings.overlap_param_gather:  # the optimizer gathers them; a dry run has none
                measured.planned_collectives["parameters"] = 0
        stop_process_groups()
    return measured


def _differences(measured: dict[int, MeasuredRank], kinds: dict[tuple, int]) -> Iterable[str]:
    """Yield sentences on ranks that differ from the plan, from ranks of their kind or in messages.

    Args:
        measured: The ranks.
        kinds: The first rank of each (stage, number of vocabulary rows).
    """
    for rank, one in measured.items():
        if one.parameters != one.planned_parameters:
            yield f"rank {rank} has {one.parameters} parameters, planned {one.planned_parameters}"
        if one.flops is not None and one.flops != one.planned_flops:
            yield f"rank {rank} does {one.flops} operations, planned {one.planned_flops}"
        for kind, size in one.collectives.items():
            planned = one.planned_collectives[kind]
            if abs(size - planned) > PADDING * planned + SCALARS:
                sent = f"{size:.0f} bytes in collectives ({kind}), planned {planned:.0f}"
                yield f"rank {rank} sends {sent}"
        first = next(other for kind, other in kinds.items() if kind[0] == one.place.stage)
        if one.shapes != measured[first].shapes:
            yield f"rank {rank} holds other parameters than rank {first}, of the same stage"
        for peer, messages in _compared(one, measured):
            expected = measured[peer].received.get(rank)
            if expected != messages:
                sent = f"{len(messages)} messages to {peer}"
                yield f"rank {rank} sends {sent}, which expects {expected}"


def _compared(
    one: MeasuredRank, measured: dict[int, MeasuredRank]
) -> Iterable[tuple[int, list[Message]]]:
    """Yield (receiver, messages) of one rank for receivers that were stepped too."""
    for peer, messages in one.sent.items():
        if peer in measured and measured[peer].flops is not None:
            yield peer, messages


def dry_run(
    settings: Settings,
    vocab_size: int,
    world_size: int,
    plan: Plan,
    ranks: list[int] | None,
    whole: bool,
    progress: Callable[[str], None],
) -> DryRun:
    """Build and step ranks without devices, and compare them with the plan.

    Without ``ranks``, all are built and one of each kind is stepped: ranks of one stage that hold
    the same number of vocabulary rows without padding do the same work.

    Collective: groups of the pretended world, in which this process is one rank after another.

    Args:
        settings: The run.
        vocab_size: Number of real tokens.
        world_size: Number of processes of the pretended world.
        plan: The run's plan.
        ranks: The ranks to build and step; None: all, as above.
        whole: Whether a step has all its micro-batches, or only enough to show every pass.
        progress: Called with a text for each rank.
    """
    settings = replace(settings, vocab_size=vocab_size, distributed_backend="auto")
    platform = MetaPlatform()
    platform.prepare()
    micro_batches = num_micro_batches(settings, world_size)
    if not whole:
        micro_batches = min(micro_batches, SHORT_STEP * settings.pipeline_model_parallel_size)
    stride = world_size // settings.pipeline_model_parallel_size
    measured: dict[int, MeasuredRank] = {}
    kinds: dict[tuple, int] = {}
    for rank in range(world_size) if ranks is None else ranks:
        tensor_rank = rank % settings.tensor_model_parallel_size
        kind = (rank // stride, len(vocabulary_rows(settings, vocab_size, tensor_rank)))
        steps = ranks is not None or kind not in kinds
        kinds.setdefault(kind, rank)
        progress(f"rank {rank}" + (": a step" if steps else ""))
        measured[rank] = measure_rank(
            settings, vocab_size, rank, world_size, plan, platform, micro_batches if steps else None
        )
    compared = sum(
        len(messages) for one in measured.values() for _, messages in _compared(one, measured)
    )
    return DryRun(measured, micro_batches, compared, list(_differences(measured, kinds)))
