"""What ranks of a fully sharded run (``--data-parallel fsdp``) gather: how much of it stands at one time, and how much is sent.

As ``parallel.fsdp`` and torch's ``fully_shard`` do it: each layer, the embedding and each output matrix is gathered where it is used, the
next layer ahead of its turn.
"""

from dataclasses import dataclass

from megatron_sorted.planning.work import ChunkWork, element_bytes, parameters_on_rank, shapes_of
from megatron_sorted.settings.run import Settings


@dataclass(frozen=True)
class Gathered:
    """What one rank of a fully sharded run has in whole, beside the rows that it keeps. Unit: bytes.

    Attributes:
        always: Through backward: the shared output matrix, and the fp32 sum of what exits add to its gradient.
        exit_loss: While one exit is computed: a matrix of its own with its gradient; the next layer, gathered ahead.
        layer_backward: A layer with its gradient, and the next layer, gathered ahead.
        layer_reduction: When the layer itself is gone: its gradient while it is summed over ranks, and the next layer.
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
    """Return what a rank of a run that is fully sharded over ``ranks`` gathers; nothing of any other run."""
    if settings.data_parallel != "fsdp":
        return Gathered()
    shapes, e = shapes_of(settings, vocab_size), element_bytes(settings)
    matrix, layer = shapes.vocabulary * shapes.hidden, shapes.parameters(settings)
    own = settings.untie_exit_output_weights and any(
        depth != settings.num_layers for depth in chunk.trained
    )
    # a gradient beside its fp32 copy, then the copy beside the rows that are received; gloo reduces a second copy
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
    """Return the sizes of all parameters that a rank of a fully sharded run gathers in a step, and of all gradients that are summed and
    cut, in whole.

    Layers and embedding are gathered in forward and in backward, an output matrix for backward; gradients are fp32. What exits add to norms
    and a shared output matrix is summed once a step, all else in every micro-batch.
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
