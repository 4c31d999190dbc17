"""Memory of one rank of every stage, by use. Unit: bytes.

What autograd keeps of a layer was read with saved-tensor hooks: Megatron's local layer with torch's
attention, torch 2.13. Dropout and masks of documents that share a sample are not counted:
micro batch x length^2 numbers, kept for each micro-batch in flight.
"""

from dataclasses import dataclass

from megatron_sorted.planning.devices import Device
from megatron_sorted.planning.operations import recomputed_layers
from megatron_sorted.planning.schedule import most_alive, passes_of_stage
from megatron_sorted.planning.sharded import gathered_bytes
from megatron_sorted.planning.work import (
    ChunkWork,
    element_bytes,
    muon_parameters_on_rank,
    parameters_on_rank,
    shapes_of,
)
from megatron_sorted.settings.averaging import averaging_of
from megatron_sorted.settings.derived import data_parallel_size, num_micro_batches
from megatron_sorted.settings.layout import num_virtual_chunks, vocabulary_rows
from megatron_sorted.settings.run import Settings


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank, by use.

    Attributes:
        weights: Parameters in the run's precision.
        gradients: The parameters' fp32 gradient buffers.
        optimizer: Moments, and fp32 copies of half-precision parameters.
        averages: The fp32 average of the rank's share of weights (--average-weights-from).
        activations: Activations of the micro-batches in flight, at most.
        exit_loss: Temporary tensors of one exit's loss and gradient.
        layer_backward: Temporary tensors of one layer's backward; with recomputation the layer's
            activations too.
        embedding_backward: The embedding's gradient before it is added to its buffer, which happens
            when its micro-batch's activations are freed.
        gathered: Whole weights and gradients of a fully sharded run, through all of backward.
        update: Temporary tensors of the optimizer's step, when there are no activations; on CPU
            also the copy that gloo reduces and scatters.
        reserved: Memory of driver, communication buffers and fragments.
        gradients_to_come: The part of the gradients that appears while activations are freed: all
            of a fully sharded step of one micro-batch.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    exit_loss: int
    layer_backward: int
    embedding_backward: int
    gathered: int
    update: int
    reserved: int
    gradients_to_come: int = 0
    averages: int = 0

    @property
    def states(self) -> int:
        """Return the memory that is in use throughout a step."""
        return self.weights + self.gradients + self.optimizer + self.averages

    @property
    def total(self) -> int:
        """Return the most memory in use at any moment of a step."""
        backward = (
            self.activations + max(self.exit_loss, self.layer_backward) - self.gradients_to_come
        )
        return (
            self.states
            + max(self.gathered + max(backward, self.embedding_backward), self.update)
            + self.reserved
        )


def tokens_of_shard(settings: Settings) -> int:
    """Return a micro-batch's tokens whose hidden states a rank holds between parallel parts."""
    tokens = settings.micro_batch_size * settings.seq_length
    return tokens // settings.tensor_model_parallel_size if settings.sequence_parallel else tokens


def _norm_bytes(settings: Settings, fused: bool) -> int:
    """Return the bytes that a norm keeps of each element.

    A fused norm keeps its input; one of simpler kernels also the normed input, both in fp32.
    """
    return element_bytes(settings) if fused or settings.normalization == "LayerNorm" else 8


def layer_bytes(
    settings: Settings, vocab_size: int, fused: bool, parts: tuple[str, ...] = ("attention", "mlp")
) -> int:
    """Return the bytes that forward keeps of one layer and one micro-batch.

    Args:
        settings: The run.
        vocab_size: Number of real tokens.
        fused: Whether the device has fused kernels.
        parts: "attention", "mlp" or both, with their norms.
    """
    shapes, e = shapes_of(settings, vocab_size), element_bytes(settings)
    tokens = settings.micro_batch_size * settings.seq_length
    shard = tokens_of_shard(settings) * shapes.hidden
    norm, sandwich = _norm_bytes(settings, fused), settings.use_sandwich_norm
    total = 0
    if "attention" in parts:
        rotary = settings.position_embedding_type == "rope"
        total += shard * (norm + e + norm * sandwich)
        rotated = (shapes.query + shapes.key_value) * rotary
        total += tokens * e * (2 * shapes.query + 2 * shapes.key_value + rotated)
        # One number for each query and head: the logarithm of its sum of exponentials.
        total += tokens * 4 * (shapes.query // shapes.head)
        total += 4 * settings.seq_length * shapes.head * e * rotary
        if settings.qk_layernorm:
            normed = (0 if fused else 4) * (shapes.query + shapes.key_value)
            total += tokens * (shapes.query * e + normed)
    if "mlp" in parts:
        width = shapes.fc1 + shapes.ffn * (3 if settings.swiglu else 1)
        total += shard * (norm + e + norm * sandwich) + tokens * e * width
    return total


def chunk_bytes(settings: Settings, work: ChunkWork, vocab_size: int, device: Device) -> int:
    """Return the bytes that forward keeps of one micro-batch in a model chunk."""
    shapes, e = shapes_of(settings, vocab_size), element_bytes(settings)
    state = tokens_of_shard(settings) * shapes.hidden * e
    again = recomputed_layers(settings, work.segments)
    whole = layer_bytes(settings, vocab_size, device.fused)
    if settings.recompute_granularity == "selective" and "mlp" in settings.recompute_modules:
        norm = _norm_bytes(settings, device.fused) * (1 + settings.use_sandwich_norm) + e
        whole = layer_bytes(settings, vocab_size, device.fused, ("attention",))
        whole += tokens_of_shard(settings) * shapes.hidden * norm
    inputs = again
    if again and settings.recompute_method == "uniform":
        inputs = sum(-(-layers // settings.recompute_num_layers) for layers in work.segments)
    # An exit keeps its hidden state, which deeper layers or their norm may keep in any case, in the
    # same precision.
    separate = e == 2 and not device.fused and not again
    ends_here = work.layers_before + work.num_layers in work.exits
    kept = (ends_here or not device.fused) + (len(work.trained) - ends_here if separate else 0)
    return (work.num_layers - again) * whole + inputs * state + max(kept, 0) * state


def exit_loss_bytes(settings: Settings, vocab_size: int, chunk_tokens: int, fused: bool) -> int:
    """Return the bytes of one exit's temporary tensors in the computation of its loss."""
    shapes, e = shapes_of(settings, vocab_size), element_bytes(settings)
    tokens = settings.micro_batch_size * settings.seq_length
    rows = len(vocabulary_rows(settings, vocab_size, 0))
    logits = min(settings.exit_loss_chunk_tokens or chunk_tokens, tokens) * rows
    states = tokens * shapes.hidden * e * (2 if settings.sequence_parallel else 1)
    states += tokens_of_shard(settings) * shapes.hidden * (e + _norm_bytes(settings, fused))
    parts = layer_bytes(settings, vocab_size, fused) * settings.use_exit_block
    parts += layer_bytes(settings, vocab_size, fused, ("mlp",)) * settings.use_exit_mlp
    return logits * (4 if e == 4 else 2 * e + 4) + states + parts


def layer_backward_bytes(
    settings: Settings, vocab_size: int, segments: tuple[int, ...], fused: bool
) -> int:
    """Return the bytes of a layer's backward beside kept activations: gradients, recomputation."""
    shapes, e = shapes_of(settings, vocab_size), element_bytes(settings)
    tokens = settings.micro_batch_size * settings.seq_length
    state = tokens_of_shard(settings) * shapes.hidden * e
    hidden, sequence = tokens * shapes.hidden * e, settings.sequence_parallel
    # Backward of the MLP's second product, then of its first, when the inner activations are freed.
    second = (tokens + shapes.hidden) * shapes.ffn * e + hidden * sequence
    freed = tokens * shapes.ffn * e * (3 if settings.swiglu else 1)
    first = (tokens + shapes.hidden) * shapes.fc1 * e + hidden * (1 + sequence) - freed
    total = max(second, first) + 2 * state
    if recomputed_layers(settings, segments):
        group = 1
        if settings.recompute_method == "uniform":
            group = min(settings.recompute_num_layers, max(segments))
        total += group * layer_bytes(settings, vocab_size, fused)
    elif settings.recompute_granularity == "selective" and "mlp" in settings.recompute_modules:
        total += tokens * e * (shapes.fc1 + shapes.ffn * (3 if settings.swiglu else 1))
    return total


def memory_of_stage(
    settings: Settings,
    chunks: list[ChunkWork],
    vocab_size: int,
    world_size: int,
    device: Device,
    chunk_tokens: int,
) -> RankMemory:
    """Return the memory of one rank of the stage that holds ``chunks``.

    Args:
        settings: The run.
        chunks: The stage's model chunks, in order.
        vocab_size: Number of real tokens.
        world_size: Number of processes.
        device: The device of each process.
        chunk_tokens: Tokens whose logits exist at one time unless the settings give their number.
    """
    shapes, e = shapes_of(settings, vocab_size), element_bytes(settings)
    dp = data_parallel_size(settings, world_size)
    parameters = sum(
        sum(parameters_on_rank(settings, chunk, vocab_size).values()) for chunk in chunks
    )
    moments = 4 * (settings.sgd_momentum > 0) if settings.optimizer == "sgd" else 8
    # Muon keeps one number for each element of its matrices, and Adam two for each of the others.
    saved_by_muon = (
        4
        * (settings.optimizer == "muon")
        * sum(muon_parameters_on_rank(settings, chunk, vocab_size) for chunk in chunks)
    )
    # Fully sharded: fp32 rows of weights, gradients and moments, for any precision.
    in_rows = settings.data_parallel == "fsdp"
    updated = -(-parameters // dp) if settings.use_distributed_optimizer or in_rows else parameters
    kept = [chunk_bytes(settings, chunk, vocab_size, device) for chunk in chunks]
    micro_batches = num_micro_batches(settings, world_size)
    stages, virtual = settings.pipeline_model_parallel_size, num_virtual_chunks(settings)
    passes = passes_of_stage(chunks[0].stage, stages, virtual, micro_batches)
    alive = most_alive(passes, kept)
    matrix = shapes.vocabulary * shapes.hidden
    has_embedding = any(chunk.has_embedding for chunk in chunks)
    has_matrix = has_embedding or any(chunk.owns_head for chunk in chunks)
    largest = max(matrix * has_matrix, shapes.fc1 * shapes.hidden)
    # A fully sharded run has one stage, and one chunk.
    gathered = gathered_bytes(settings, chunks[0], vocab_size, dp, device.fused)
    exit_loss = exit_loss_bytes(settings, vocab_size, chunk_tokens, device.fused)
    layer_backward = max(
        layer_backward_bytes(settings, vocab_size, chunk.segments, device.fused) for chunk in chunks
    )
    embedding_backward = 0
    if has_embedding:
        embedding_backward = int(max(alive - kept[0], 0))
        embedding_backward += gathered.embedding_backward or matrix * e
    gradients = 4 * (updated if in_rows else parameters)
    # torch updates many tensors at once, or one by one with two temporary tensors (a root, and the
    # same divided); gloo reduces a copy of gradients that are scattered.
    copied = parameters * (settings.use_distributed_optimizer and dp > 1)
    update = 4 * updated if device.fused else max(8 * min(largest, updated), 4 * copied)
    return RankMemory(
        weights=updated * 4 if in_rows else parameters * e,
        gradients=gradients,
        optimizer=updated * (moments + (4 if e == 2 and not in_rows else 0)) - saved_by_muon,
        activations=int(alive),
        exit_loss=(exit_loss + gathered.exit_loss) * any(chunk.trained for chunk in chunks),
        layer_backward=max(layer_backward + gathered.layer_backward, gathered.layer_reduction),
        embedding_backward=embedding_backward,
        gathered=gathered.always,
        update=update,
        reserved=device.reserved_bytes,
        gradients_to_come=gradients if in_rows and micro_batches == 1 else 0,
        averages=4 * updated * (averaging_of(settings) is not None),
    )
