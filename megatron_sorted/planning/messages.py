"""What one rank of every stage sends in a step, by kind. Unit: bytes; all-reduces and their halves as rings send them."""

from dataclasses import dataclass

from megatron_sorted.planning.devices import Device
from megatron_sorted.planning.memory import element_bytes, tokens_of_shard
from megatron_sorted.planning.operations import recomputed_layers
from megatron_sorted.planning.work import ChunkWork, parameters_on_rank, shapes_of
from megatron_sorted.settings.derived import data_parallel_size, num_micro_batches
from megatron_sorted.settings.run import Settings


@dataclass(frozen=True)
class Messages:
    """Sent by one rank in one step.

    Attributes:
        tensor: Parts of layers and exits, summed or gathered over tensor parallel ranks.
        pipeline: Hidden states and their gradients.
        gradients: Over data parallel ranks.
        parameters: Over data parallel ranks, with the distributed optimizer.
        copies: Gradients of norms and heads that several stages hold.
    """

    tensor: int
    pipeline: int
    gradients: int
    parameters: int
    copies: int


def ring(size: int, ranks: int) -> float:
    """Returns what a rank sends when ``size`` bytes are gathered, or summed and scattered, over ``ranks``; an all-reduce is both."""
    return size * (ranks - 1) / ranks


def state_bytes(settings: Settings) -> int:
    """Returns the size of a message between two stages."""
    return tokens_of_shard(settings) * settings.hidden_size * element_bytes(settings)


def collectives_of_chunk(settings: Settings, work: ChunkWork) -> tuple[int, int]:
    """Returns how often a hidden state of a whole micro-batch is gathered or reduced in a chunk's forward, and in its backward.

    An all-reduce counts two. With sequence parallelism backward gathers the inputs of products once more, and exits gather and scatter.
    """
    if settings.tensor_model_parallel_size == 1:
        return 0, 0
    forward = 4 * work.num_layers + work.has_embedding * (1 if settings.sequence_parallel else 2)
    backward = (6 if settings.sequence_parallel else 4) * work.num_layers + work.has_embedding * settings.sequence_parallel
    return forward, backward + 2 * len(work.trained) + 4 * recomputed_layers(settings, work.segments)


def copies_bytes(settings: Settings, chunks: list[ChunkWork], stage: int, vocab_size: int) -> float:
    """Returns what a rank of ``stage`` sends to keep its copies of norm and head equal to those of other stages."""
    shapes, total = shapes_of(settings, vocab_size), 0.0
    for size, holds in ((shapes.norm, "owns_norm"), (shapes.vocabulary * shapes.hidden, "owns_head")):
        stages = {chunk.stage for chunk in chunks if getattr(chunk, holds)}
        if stage in stages:
            total += 2 * ring(4 * size, len(stages))
    return total


def messages_of_stage(settings: Settings, chunks: list[ChunkWork], stage: int, vocab_size: int, world_size: int) -> Messages:
    """Returns what a rank of ``stage`` sends; ``chunks`` are those of all stages."""
    mine = [chunk for chunk in chunks if chunk.stage == stage]
    tp, dp = settings.tensor_model_parallel_size, data_parallel_size(settings, world_size)
    micro_batches, e = num_micro_batches(settings, world_size), element_bytes(settings)
    parameters = sum(sum(parameters_on_rank(settings, chunk, vocab_size).values()) for chunk in mine)
    whole = settings.micro_batch_size * settings.seq_length * settings.hidden_size * e
    passes = sum(sum(collectives_of_chunk(settings, chunk)) for chunk in mine)
    sends = 0
    if settings.pipeline_model_parallel_size > 1:
        sends = sum((not chunk.is_last) + (not chunk.has_embedding) for chunk in mine)
    sharded = settings.use_distributed_optimizer
    return Messages(
        tensor=int(micro_batches * passes * ring(whole, tp)),
        pipeline=micro_batches * sends * state_bytes(settings),
        gradients=int((1 if sharded else 2) * ring(4 * parameters, dp)),
        parameters=int(ring(e * parameters, dp)) if sharded else 0,
        copies=int(copies_bytes(settings, chunks, stage, vocab_size)),
    )


@dataclass(frozen=True)
class Links:
    """Rate and delay of the links of each kind of group: tensor and data parallel groups, neighbours in the pipeline."""

    tensor: tuple[float, float]
    data: tuple[float, float]
    pipeline: tuple[float, float]


def links_of(settings: Settings, world_size: int, device: Device) -> Links:
    """Returns the links each kind of group has: ranks are numbered through tensor, then data, then pipeline position, host by host."""
    tp, dp = settings.tensor_model_parallel_size, data_parallel_size(settings, world_size)

    def link(span: int) -> tuple[float, float]:
        near = span <= device.per_host
        return (device.near_rate, device.near_delay) if near else (device.far_rate, device.far_delay)

    return Links(link(tp), link(tp * dp), link(world_size))
