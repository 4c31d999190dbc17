"""Memory of one rank of every stage, part by part. Unit: bytes.

What autograd keeps of a layer was read off with saved-tensor hooks: Megatron's local layer with torch's attention, torch 2.13. Dropout and
masks of documents that share a sample are not counted: micro batch x length^2 numbers, kept for each micro-batch in flight.
"""

from dataclasses import dataclass

from megatron_sorted.planning.devices import Device
from megatron_sorted.planning.operations import real_rows, recomputed_layers
from megatron_sorted.planning.schedule import most_alive, passes_of_stage
from megatron_sorted.planning.sharded import gathered_bytes
from megatron_sorted.planning.work import ChunkWork, element_bytes, parameters_on_rank, shapes_of
from megatron_sorted.settings.derived import data_parallel_size, num_micro_batches
from megatron_sorted.settings.layout import num_virtual_chunks
from megatron_sorted.settings.run import Settings


@dataclass(frozen=True)
class RankMemory:
    """Where the memory of one rank goes.

    Attributes:
        weights: Parameters in the run's precision.
        gradients: Their fp32 buffers.
        optimizer: Moments, and fp32 copies of half-precision parameters.
        activations: What forward keeps for the micro-batches in flight, at most.
        exit_loss: What one exit's loss and gradient take while they are computed.
        layer_backward: What one layer's backward takes beside what was kept; with recomputation the layer's activations too.
        embedding_backward: The embedding's gradient before it is added to its buffer; comes when its micro-batch's activations are gone.
        gathered: Whole weights and gradients of what ranks keep in parts (``--data-parallel fsdp``), through all of backward.
        update: What the optimizer's step takes, when no activations are there; on cores also the copy that gloo reduces and cuts.
        reserved: Driver, communication buffers, fragments.
        gradients_to_come: Of the gradients, those that are made while activations go: all of a fully sharded step of one micro-batch.
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

    @property
    def states(self) -> int:
        """Return what is there all the time."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Return the largest amount at any moment of a step."""
        backward = (
            self.activations + max(self.exit_loss, self.layer_backward) - self.gradients_to_come
        )
        return (
            self.states
            + max(self.gathered + max(backward, self.embedding_backward), self.update)
            + self.reserved
        )


def tokens_of_shard(settings: Settings) -> int:
    """Return the tokens of a micro-batch whose hidden state one rank holds between the parallel parts of a layer."""
    tokens = settings.micro_batch_size * settings.seq_length
    return tokens // settings.tensor_model_parallel_size if settings.sequence_parallel else tokens


def _norm_bytes(settings: Settings, fused: bool) -> int:
    """Return what a norm keeps of each element: its input; composed of simpler kernels also the normed input, both in fp32."""
    return element_bytes(settings) if fused or settings.normalization == "LayerNorm" else 8


def layer_bytes(
    settings: Settings, vocab_size: int, fused: bool, parts: tuple[str, ...] = ("attention", "mlp")
) -> int:
    """Return what forward keeps of one layer and one micro-batch; ``parts``: of attention, MLP or both, with their norms."""
    shapes, e = shapes_of(settings, vocab_size), element_bytes(settings)
    tokens, shard = (
        settings.micro_batch_size * settings.seq_length,
        tokens_of_shard(settings) * shapes.hidden,
    )
    norm, sandwich = _norm_bytes(settings, fused), settings.use_sandwich_norm
    total = 0
    if "attention" in parts:
        rotary = settings.position_embedding_type == "rope"
        total += shard * (norm + e + norm * sandwich)
        total += (
            tokens
            * e
            * (
                shapes.query
                + 2 * shapes.key_value
                + (shapes.query + shapes.key_value) * rotary
                + shapes.query
            )
        )
        total += (
            tokens * 4 * (shapes.query // shapes.head)
        )  # one number per query: the logarithm of its sum
        total += 4 * settings.seq_length * shapes.head * e * rotary
        if settings.qk_layernorm:
            total += tokens * (
                shapes.query * e + (0 if fused else 4) * (shapes.query + shapes.key_value)
            )
    if "mlp" in parts:
        total += shard * (norm + e + norm * sandwich) + tokens * e * (
            shapes.fc1 + shapes.ffn * (3 if settings.swiglu else 1)
        )
    return total


def chunk_bytes(settings: Settings, work: ChunkWork, vocab_size: int, device: Device) -> int:
    """Return what forward keeps of one micro-batch in a chunk."""
    shapes, e = shapes_of(settings, vocab_size), element_bytes(settings)
    state = tokens_of_shard(settings) * shapes.hidden * e
    again = recomputed_layers(settings, work.segments)
    whole = layer_bytes(settings, vocab_size, device.fused)
    if settings.recompute_granularity == "selective" and "mlp" in settings.recompute_modules:
        norm = (
            tokens_of_shard(settings)
            * shapes.hidden
            * (_norm_bytes(settings, device.fused) * (1 + settings.use_sandwich_norm) + e)
        )
        whole = layer_bytes(settings, vocab_size, device.fused, ("attention",)) + norm
    if settings.recompute_method == "uniform":
        inputs = (
            sum(-(-layers // settings.recompute_num_layers) for layers in work.segments)
            if again
            else 0
        )
    else:
        inputs = again
    # an exit keeps its hidden state: alive anyway if deeper layers or their norm keep it too, in the same precision
    separate = e == 2 and not device.fused and not again
    ends_here = work.first_layer + work.num_layers in work.exits
    kept = (ends_here or not device.fused) + (len(work.trained) - ends_here if separate else 0)
    return (work.num_layers - again) * whole + inputs * state + max(kept, 0) * state


def exit_loss_bytes(settings: Settings, vocab_size: int, chunk_tokens: int, fused: bool) -> int:
    """Return what one exit takes while its loss and gradients are computed, token chunk by token chunk."""
    shapes, e = shapes_of(settings, vocab_size), element_bytes(settings)
    tokens = settings.micro_batch_size * settings.seq_length
    logits = min(settings.exit_loss_chunk_tokens or chunk_tokens, tokens) * real_rows(
        settings, vocab_size, 0
    )
    gathered = 2 if settings.sequence_parallel else 1
    states = tokens * shapes.hidden * e * gathered + tokens_of_shard(settings) * shapes.hidden * (
        2 * e + _norm_bytes(settings, fused) - e
    )
    parts = layer_bytes(settings, vocab_size, fused) * settings.use_exit_block
    parts += layer_bytes(settings, vocab_size, fused, ("mlp",)) * settings.use_exit_mlp
    return logits * (4 if e == 4 else 2 * e + 4) + states + parts


def layer_backward_bytes(
    settings: Settings, vocab_size: int, segments: tuple[int, ...], fused: bool
) -> int:
    """Return what a layer's backward takes beside what forward kept: gradients on their way, and what is computed again."""
    shapes, e = shapes_of(settings, vocab_size), element_bytes(settings)
    tokens, state = (
        settings.micro_batch_size * settings.seq_length,
        tokens_of_shard(settings) * shapes.hidden * e,
    )
    gathered = tokens * shapes.hidden * e
    second = (
        tokens * shapes.ffn * e
        + shapes.ffn * shapes.hidden * e
        + gathered * settings.sequence_parallel
    )
    freed = tokens * shapes.ffn * e * (3 if settings.swiglu else 1)
    first = (
        tokens * shapes.fc1 * e
        + shapes.fc1 * shapes.hidden * e
        + gathered * (1 + settings.sequence_parallel)
        - freed
    )
    total = max(second, first) + 2 * state
    if recomputed_layers(settings, segments):
        group = (
            min(settings.recompute_num_layers, max(segments))
            if settings.recompute_method == "uniform"
            else 1
        )
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
        chunks: Of the stage, in order.
        vocab_size: Real tokens.
        world_size: Processes.
        device: What each runs on.
        chunk_tokens: Tokens whose logits exist at one time unless the settings say.
    """
    shapes, e, dp = (
        shapes_of(settings, vocab_size),
        element_bytes(settings),
        data_parallel_size(settings, world_size),
    )
    parameters = sum(
        sum(parameters_on_rank(settings, chunk, vocab_size).values()) for chunk in chunks
    )
    moments = 8 if settings.optimizer == "adam" else 4 * (settings.sgd_momentum > 0)
    in_rows = (
        settings.data_parallel == "fsdp"
    )  # fp32 rows of weights, gradients and moments, which serve any precision
    updated = -(-parameters // dp) if settings.use_distributed_optimizer or in_rows else parameters
    kept = [chunk_bytes(settings, chunk, vocab_size, device) for chunk in chunks]
    micro_batches = num_micro_batches(settings, world_size)
    alive = most_alive(
        passes_of_stage(
            chunks[0].stage,
            settings.pipeline_model_parallel_size,
            num_virtual_chunks(settings),
            micro_batches,
        ),
        kept,
    )
    matrix = shapes.vocabulary * shapes.hidden * e * any(chunk.has_embedding for chunk in chunks)
    largest = max(
        shapes.vocabulary
        * shapes.hidden
        * any(chunk.has_embedding or chunk.owns_head for chunk in chunks),
        shapes.fc1 * shapes.hidden,
    )
    gathered = gathered_bytes(
        settings, chunks[0], vocab_size, dp, device.fused
    )  # fsdp has one stage, and one chunk
    gradients = 4 * (updated if in_rows else parameters)
    # torch updates many tensors at once, or one by one, a root and the same divided; gloo reduces a copy of gradients that are to be cut
    copied = parameters * (settings.use_distributed_optimizer and dp > 1)
    update = 4 * updated if device.fused else max(8 * min(largest, updated), 4 * copied)
    return RankMemory(
        weights=updated * 4 if in_rows else parameters * e,
        gradients=gradients,
        optimizer=updated * (moments + (4 if e == 2 and not in_rows else 0)),
        activations=int(alive),
        exit_loss=(
            exit_loss_bytes(settings, vocab_size, chunk_tokens, device.fused) + gathered.exit_loss
            if any(chunk.trained for chunk in chunks)
            else 0
        ),
        layer_backward=max(
            max(
                layer_backward_bytes(settings, vocab_size, chunk.segments, device.fused)
                for chunk in chunks
            )
            + gathered.layer_backward,
            gathered.layer_reduction,
        ),
        embedding_backward=int(max(alive - kept[0], 0)) + (gathered.embedding_backward or matrix)
        if matrix
        else 0,
        gathered=gathered.always,
        update=update,
        reserved=device.reserved_bytes,
        gradients_to_come=gradients if in_rows and micro_batches == 1 else 0,
    )
