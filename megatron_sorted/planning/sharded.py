"""Gathered parameters of a fully sharded run (``--data-parallel fsdp``): memory and messages.

``parallel.fsdp`` and torch's ``fully_shard`` gather each layer, the embedding and each output
matrix where it is used, and the next layer in advance.
"""

from dataclasses import dataclass

from megatron_sorted.planning.work import ChunkWork, element_bytes, parameters_on_rank, shapes_of
from megatron_sorted.settings.run import Settings


@dataclass(frozen=True)
class Gathered:
    """Whole tensors on one rank of a fully sharded run, beside the rows that it keeps. Unit: bytes.

    Attributes:
        always: The shared output matrix and the fp32 sum of exits' gradients, through backward.
        exit_loss: An exit's own matrix with its gradient while the exit is computed, and the next
            layer, gathered in advance.
        layer_backward: A layer with its gradient, and the next layer, gathered in advance.
        layer_reduction: A layer's gradient while it is summed over ranks (the layer itself is
            freed), and the next layer.
        embedding_backward: The embedding's gradient while it is summed over ranks.
    """

    always: int = 0
    exit_loss: int = 0
    layer_backward: int = 0
    layer_reduction: int = 0
    embedding_backward: int = 0


def gathered_bytes(
    settings: Settings, chunk: ChunkWork, vocab_size: int, ranks: int, fused: bool
) -> Gathered:
    """Return what a rank of a run that is fully sharded over ``ranks`` holds whole; else zeros."""
    if settings.data_parallel != "fsdp":
        return Gathered()
    shapes, e = shapes_of(settings, vocab_size), element_bytes(settings)
    matrix, layer = shapes.vocabulary * shapes.hidden, shapes.parameters(settings)
    own = settings.untie_exit_output_weights and any(
        depth != settings.num_layers for depth in chunk.trained
    )
    # A gradient beside its fp32 copy, then the copy beside the received rows; gloo reduces a second
    # copy.
    summed = max(e + 4, 4 * (1 if fused else 2) + -(-4 // ranks))
    return Gathered(
        always=matrix * (e + 4) * bool(chunk.trained),
        exit_loss=matrix * (e + 4) * own + layer * e,
        layer_backward=3 * layer * e,
        layer_reduction=layer * (e + summed),
        embedding_backward=matrix * summed,
    )


def sharded_bytes(
    settings: Settings, chunk: ChunkWork, vocab_size: int, micro_batches: int
) -> tuple[int, int]:
    """Return the bytes of whole parameters gathered, and of whole gradients reduced, in a step.

    Layers and embedding are gathered in forward and in backward, an output matrix for backward;
    gradients are fp32. Exits' gradients to norms and to a shared output matrix are summed once a
    step, all others in every micro-batch.
    """
    shapes, held = shapes_of(settings, vocab_size), parameters_on_rank(settings, chunk, vocab_size)
    own = (
        sum(depth != settings.num_layers for depth in chunk.trained)
        * settings.untie_exit_output_weights
    )
    matrix, tied = (
        shapes.vocabulary * shapes.hidden,
        not settings.untie_embeddings_and_output_weights,
    )
    shared = bool(chunk.trained) * matrix
    layers, embedding = held["layers"], held["embedding"]
    gathered = 2 * (layers + embedding) + own * matrix + shared * (not tied)
    summed = micro_batches * (layers + embedding + own * matrix) + shared + held["norms"]
    return (micro_batches * gathered + held["norms"]) * element_bytes(settings), summed * 4
