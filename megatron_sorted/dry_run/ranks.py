"""Builds ranks of a layout without devices, runs steps of them, and compares with the plan. A process that did it can do nothing else."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch

from megatron_sorted.data.batches import Batch
from megatron_sorted.dry_run.counting import Counter, Message
from megatron_sorted.parallel.groups import Place, start_process_groups, stop_process_groups
from megatron_sorted.planning.estimate import Plan
from megatron_sorted.planning.messages import messages_of_stage
from megatron_sorted.planning.operations import operations_of_chunk, real_rows
from megatron_sorted.planning.work import work_of_chunks
from megatron_sorted.platform.meta import MetaPlatform, pretended_world
from megatron_sorted.settings.derived import num_micro_batches
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step.build import Model, build_model
from megatron_sorted.training.step.forward_step import ForwardStep
from megatron_sorted.training.step.train_step import run_schedule

SHORT_STEP = 2
"""Micro-batches per stage in a step that is not run whole: every pass of the schedule occurs, with its messages."""

PADDING, SCALARS = 0.01, 1024
"""Of a collective's bytes, what buffers may be padded by; bytes of numbers that are summed in a step, such as that of trained tokens."""


@dataclass
class MeasuredRank:
    """What was found of one rank.

    Attributes:
        planned_parameters, planned_flops: What the plan says of it.
        flops: Counted in a step; None where an equal rank's step stands for it.
        collectives, planned_collectives: {kind of group: bytes} that this rank sends in collectives of a step, up to the optimizer.
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
    """What a dry run found.

    Attributes:
        ranks: Those that were built.
        micro_batches: Of a step that was run.
        messages: Numbers of messages compared between pairs of ranks that were both stepped.
        problems: Where anything differs from the plan or between ranks; empty if all is well.
    """

    ranks: dict[int, MeasuredRank]
    micro_batches: int
    messages: int
    problems: list[str]


def shapes_of_model(model: Model) -> dict[str, tuple]:
    """Return {name: shape and dtype} of all parameters of a rank."""
    return {
        f"{number}.{name}": (tuple(p.shape), str(p.dtype))
        for number, chunk in enumerate(model.chunks)
        for name, p in chunk.named_parameters()
    }


def _step(settings: Settings, model: Model, platform: MetaPlatform, micro_batches: int) -> Counter:
    """Return what was counted in forward and backward of ``micro_batches``, and in the reduction of their gradients.

    Collective: the schedule's, answered by nobody.
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
    """Return the bytes of a counter's collectives by what its groups share.

    That is layers ("tensor"), copies of norms and heads on several stages ("copies"), or a stage,
    whose data parallel ranks sum "gradients" and gather the "parameters" that each has updated.
    """
    tensor, stage = (
        settings.tensor_model_parallel_size,
        world_size // settings.pipeline_model_parallel_size,
    )
    kinds = {"tensor": 0.0, "gradients": 0.0, "parameters": 0.0, "copies": 0.0}
    for (ranks, gathered), size in collective_bytes.items():
        one_copy, one_stage = (
            len({rank // width for rank in ranks}) == 1 for width in (tensor, stage)
        )
        of_stage = "parameters" if gathered else "gradients"
        kinds["tensor" if one_copy else of_stage if one_stage else "copies"] += size
    return kinds


def visit(
    settings: Settings,
    vocab_size: int,
    rank: int,
    world_size: int,
    plan: Plan,
    platform: MetaPlatform,
    micro_batches: int | None,
) -> MeasuredRank:
    """Return what is found of one rank; it is stepped if ``micro_batches`` says how long.

    Collective: groups of the pretended world.
    """
    with pretended_world(rank, world_size):
        place = start_process_groups(settings, platform)
        model = build_model(settings, platform, place, vocab_size)
        stage = plan.stages[place.stage]
        count = sum(p.numel() for chunk in model.chunks for p in chunk.parameters())
        found = MeasuredRank(place, count, sum(stage.parameters.values()), shapes_of_model(model))
        if micro_batches is not None:
            counter = _step(settings, model, platform, micro_batches)
            found.flops, found.sent, found.received = counter.flops, counter.sent, counter.received
            found.planned_flops = micro_batches * sum(
                operations_of_chunk(settings, chunk, vocab_size, place.tensor_rank).total
                for chunk in stage.chunks
            )
            found.collectives = by_kind_of_group(settings, world_size, counter.collective_bytes)
            samples = micro_batches * settings.micro_batch_size * place.data_size
            planned = messages_of_stage(
                replace(settings, global_batch_size=samples),
                work_of_chunks(settings),
                place.stage,
                vocab_size,
                world_size,
            )
            found.planned_collectives = {kind: getattr(planned, kind) for kind in found.collectives}
            if (
                not settings.overlap_param_gather
            ):  # the optimizer gathers them, which a dry run has none of
                found.planned_collectives["parameters"] = 0
        stop_process_groups()
    return found


def _differences(found: dict[int, MeasuredRank], kinds: dict[tuple, int]) -> Iterable[str]:
    """Yield in words where a rank differs from the plan, from ranks of its kind, or from what its neighbours send."""
    for rank, one in found.items():
        if one.parameters != one.planned_parameters:
            yield f"rank {rank} has {one.parameters} parameters, planned {one.planned_parameters}"
        if one.flops is not None and one.flops != one.planned_flops:
            yield f"rank {rank} does {one.flops} operations, planned {one.planned_flops}"
        for kind, size in one.collectives.items():
            planned = one.planned_collectives[kind]
            if abs(size - planned) > PADDING * planned + SCALARS:
                yield f"rank {rank} sends {size:.0f} bytes in collectives ({kind}), planned {planned:.0f}"
        first = next(other for kind, other in kinds.items() if kind[0] == one.place.stage)
        if one.shapes != found[first].shapes:
            yield f"rank {rank} holds other parameters than rank {first}, of the same stage"
        for peer, messages in one.sent.items():
            if (
                peer in found
                and found[peer].flops is not None
                and found[peer].received.get(rank) != messages
            ):
                yield f"rank {rank} sends {len(messages)} messages to {peer}, which expects {found[peer].received.get(rank)}"


def dry_run(
    settings: Settings,
    vocab_size: int,
    world_size: int,
    plan: Plan,
    ranks: list[int] | None,
    whole: bool,
    progress: Callable[[str], None],
) -> DryRun:
    """Return what a dry run of ``ranks`` finds; of all where None, with a step of one rank of each kind.

    Ranks of one kind are of one stage and hold as many rows of the output matrix that are no padding: they do the same.

    Collective: groups of the pretended world, in which this process is one rank after another.

    Args:
        settings: The run.
        vocab_size: Real tokens.
        world_size: Of the pretended world.
        plan: Of the run.
        ranks: To visit.
        whole: Whether a step has all its micro-batches, or as many as show every pass.
        progress: Told what is done.
    """
    settings = replace(settings, vocab_size=vocab_size, distributed_backend="auto")
    platform = MetaPlatform()
    platform.prepare()
    micro_batches = num_micro_batches(settings, world_size)
    if not whole:
        micro_batches = min(micro_batches, SHORT_STEP * settings.pipeline_model_parallel_size)
    stride = world_size // settings.pipeline_model_parallel_size
    found: dict[int, MeasuredRank] = {}
    kinds: dict[tuple, int] = {}
    for rank in range(world_size) if ranks is None else ranks:
        kind = (
            rank // stride,
            real_rows(settings, vocab_size, rank % settings.tensor_model_parallel_size),
        )
        steps = ranks is not None or kind not in kinds
        kinds.setdefault(kind, rank)
        progress(f"rank {rank}" + (": a step" if steps else ""))
        found[rank] = visit(
            settings, vocab_size, rank, world_size, plan, platform, micro_batches if steps else None
        )
    compared = sum(
        len(messages)
        for one in found.values()
        for peer, messages in one.sent.items()
        if peer in found and found[peer].flops is not None
    )
    return DryRun(found, micro_batches, compared, list(_differences(found, kinds)))
