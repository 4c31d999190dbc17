"""Bytes that one rank of every stage sends in a step, by kind; collectives as on rings."""

from dataclasses import dataclass

from megatron_sorted.planning.devices import Device
from megatron_sorted.planning.memory import tokens_of_shard
from megatron_sorted.planning.operations import recomputed_layers
from megatron_sorted.planning.sharded import sharded_bytes
from megatron_sorted.planning.work import (
    ChunkWork,
    element_bytes,
    parameters_on_rank,
    shapes_of,
    summed_parameters_on_rank,
)
from megatron_sorted.settings.derived import data_parallel_size, num_micro_batches
from megatron_sorted.settings.run import Settings


@dataclass(frozen=True)
class Messages:
    """Messages of one rank in one step. Unit: bytes.

    Attributes:
        tensor: Hidden states of layers and exits, and gradients of parameters that every rank holds
            whole, gathered or summed over tensor parallel ranks.
        pipeline: Hidden states and their gradients, between stages.
        gradients: Gradients summed over data parallel ranks; fully sharded, for every micro-batch.
        parameters: Parameters gathered over data parallel ranks: once with the distributed
            optimizer, fully sharded for every pass.
        copies: Gradients of norms and heads that several stages hold.
    """

    tensor: int
    pipeline: int
    gradients: int
    parameters: int
    copies: int


def ring(size: int, ranks: int) -> float:
    """Return the bytes that a rank sends to gather, or sum and scatter, ``size`` bytes on a ring.

    An all-reduce is both.

    >>> ring(800, ranks=4)
    600.0
    """
    return size * (ranks - 1) / ranks


def state_bytes(settings: Settings) -> int:
    """Return the bytes of a message between two stages."""
    return tokens_of_shard(settings) * settings.hidden_size * element_bytes(settings)


def collectives_of_chunk(settings: Settings, work: ChunkWork) -> tuple[int, int]:
    """Return how often a micro-batch's whole hidden state is gathered or reduced.

    The first number is of a model chunk's forward, the second of its backward. An all-reduce counts
    two: attention and MLP have one each in forward and in backward. With sequence parallelism
    backward gathers the inputs of products once more, and exits gather and scatter. Recomputed
    layers communicate again. Exits' own parts run in backward.
    """
    if settings.tensor_model_parallel_size == 1:
        return 0, 0
    sequence = settings.sequence_parallel
    half = 2 + (3 if sequence else 2)  # forward and backward of attention, or of an MLP
    own = sum(depth != settings.num_layers for depth in work.trained)
    forward = 4 * work.num_layers + work.has_embedding * (1 if sequence else 2)
    backward = (
        2 * (half - 2) * work.num_layers + work.has_embedding * sequence + 2 * len(work.trained)
    )
    backward += half * own * (2 * settings.use_exit_block + settings.use_exit_mlp)
    backward += 4 * recomputed_layers(settings, work.segments)
    if settings.recompute_granularity == "selective" and "mlp" in settings.recompute_modules:
        backward += 2 * work.num_layers
    return forward, backward


def _tensor_bytes(
    settings: Settings, chunks: list[ChunkWork], vocab_size: int, micro_batches: int
) -> float:
    """Return the bytes that a rank sends to its tensor parallel group in a step."""
    tokens = settings.micro_batch_size * settings.seq_length
    collectives = sum(sum(collectives_of_chunk(settings, chunk)) for chunk in chunks)
    states = collectives * tokens * settings.hidden_size * element_bytes(settings)
    # For each token an exit reduces largest logit, exponentials and the label's logit, in fp32.
    losses = sum(len(chunk.trained) for chunk in chunks) * 3 * 2 * tokens * 4
    summed = sum(summed_parameters_on_rank(settings, chunk, vocab_size) for chunk in chunks)
    return ring(
        micro_batches * (states + losses) + summed * 2 * 4, settings.tensor_model_parallel_size
    )


def copies_bytes(settings: Settings, chunks: list[ChunkWork], stage: int, vocab_size: int) -> float:
    """Return the bytes that a rank sends to keep norm and head equal on all their stages."""
    shapes, total = shapes_of(settings, vocab_size), 0.0
    for size, holds in (
        (shapes.norm, "owns_norm"),
        (shapes.vocabulary * shapes.hidden, "owns_head"),
    ):
        stages = {chunk.stage for chunk in chunks if getattr(chunk, holds)}
        if stage in stages:
            total += 2 * ring(4 * size, len(stages))
    return total


def messages_of_stage(
    settings: Settings, chunks: list[ChunkWork], stage: int, vocab_size: int, world_size: int
) -> Messages:
    """Return the messages of a rank of ``stage``; ``chunks`` are those of all stages."""
    mine = [chunk for chunk in chunks if chunk.stage == stage]
    dp = data_parallel_size(settings, world_size)
    micro_batches, e = num_micro_batches(settings, world_size), element_bytes(settings)
    parameters = sum(
        sum(parameters_on_rank(settings, chunk, vocab_size).values()) for chunk in mine
    )
    sends = 0
    if settings.pipeline_model_parallel_size > 1:
        sends = sum((not chunk.is_last) + (not chunk.has_embedding) for chunk in mine)
    sharded = settings.use_distributed_optimizer
    gathered, summed = e * parameters * sharded, 4 * parameters * (1 if sharded else 2)
    if settings.data_parallel == "fsdp":
        gathered, summed = sharded_bytes(settings, mine[0], vocab_size, micro_batches)
    return Messages(
        tensor=int(_tensor_bytes(settings, mine, vocab_size, micro_batches)),
        pipeline=micro_batches * sends * state_bytes(settings),
        gradients=int(ring(summed, dp)),
        parameters=int(ring(gathered, dp)),
        copies=int(copies_bytes(settings, chunks, stage, vocab_size)),
    )


@dataclass(frozen=True)
class Links:
    """(Rate, delay) of the links of tensor and data parallel groups and between stages."""

    tensor: tuple[float, float]
    data: tuple[float, float]
    pipeline: tuple[float, float]


def links_of(settings: Settings, world_size: int, device: Device) -> Links:
    """Return the links of each kind of group.

    Ranks are numbered through tensor, then data, then pipeline position, host by host.
    """
    tp, dp = settings.tensor_model_parallel_size, data_parallel_size(settings, world_size)

    def link(span: int) -> tuple[float, float]:
        near = span <= device.per_host
        return (
            (device.near_rate, device.near_delay) if near else (device.far_rate, device.far_delay)
        )

    return Links(link(tp), link(tp * dp), link(world_size))
