"""Operations of a rank's matrix products; a multiply-add counts 2."""

from dataclasses import dataclass

from megatron_sorted.planning.work import ChunkWork, Shapes, shapes_of
from megatron_sorted.settings.layout import vocabulary_rows
from megatron_sorted.settings.run import Settings


@dataclass(frozen=True)
class Operations:
    """Operations of one micro-batch in one model chunk on one rank.

    Attributes:
        forward: Products of layers with their matrices.
        forward_attention: Products of queries with keys and of probabilities with values, over all
            pairs of tokens.
        backward, backward_attention: The backward passes of these products.
        recompute, recompute_attention: Forward products that backward computes again.
        exits: All of exits that train, from norm to loss to gradients; in backward.
    """

    forward: int
    forward_attention: int
    backward: int
    backward_attention: int
    recompute: int
    recompute_attention: int
    exits: int

    @property
    def total(self) -> int:
        """Return the sum of all operations."""
        return (
            self.forward
            + self.forward_attention
            + self.backward
            + self.backward_attention
            + self.recompute
            + self.recompute_attention
            + self.exits
        )


def recomputed_layers(settings: Settings, segments: tuple[int, ...]) -> int:
    """Return how many of a model chunk's layers full recomputation runs again.

    Megatron counts ``recompute_num_layers`` in each segment.
    """
    if settings.recompute_granularity != "full":
        return 0
    if settings.recompute_method == "uniform":
        return sum(segments)
    return sum(min(settings.recompute_num_layers, layers) for layers in segments)


def exit_operations(settings: Settings, vocab_size: int, depth: int, tensor_rank: int = 0) -> int:
    """Return the operations of one micro-batch in one exit that trains.

    These are logits, the gradients of their input and of the matrix, and the exit's own parts in
    forward and backward.
    """
    tokens = settings.micro_batch_size * settings.seq_length
    shapes = shapes_of(settings, vocab_size)
    rows = len(vocabulary_rows(settings, vocab_size, tensor_rank))
    total = 3 * 2 * tokens * shapes.hidden * rows
    if depth != settings.num_layers:
        if settings.use_exit_block:
            total += 3 * (2 * tokens * shapes.products() + _attention(settings, shapes))
        if settings.use_exit_mlp:
            total += 3 * 2 * tokens * shapes.products(with_attention=False)
    return total


def _attention(settings: Settings, shapes: Shapes) -> int:
    return 2 * 2 * settings.micro_batch_size * settings.seq_length**2 * shapes.query


def operations_of_chunk(
    settings: Settings, work: ChunkWork, vocab_size: int, tensor_rank: int = 0
) -> Operations:
    """Return the operations of one micro-batch in a model chunk; only exits that train cost any."""
    shapes = shapes_of(settings, vocab_size)
    tokens = settings.micro_batch_size * settings.seq_length
    forward, attention = 2 * tokens * shapes.products(), _attention(settings, shapes)
    again = recomputed_layers(settings, work.segments)
    selective = settings.recompute_modules if settings.recompute_granularity == "selective" else ()
    mlp = 2 * tokens * shapes.products(with_attention=False)
    return Operations(
        forward=work.num_layers * forward,
        forward_attention=work.num_layers * attention,
        backward=2 * work.num_layers * forward,
        backward_attention=2 * work.num_layers * attention,
        recompute=again * forward + work.num_layers * ("mlp" in selective) * mlp,
        recompute_attention=(again + work.num_layers * ("core_attn" in selective)) * attention,
        exits=sum(
            exit_operations(settings, vocab_size, depth, tensor_rank) for depth in work.trained
        ),
    )
