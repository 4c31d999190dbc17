"""Operations of matrix products that a rank does, a multiply-add counting 2."""

from dataclasses import dataclass

from megatron_sorted.planning.work import ChunkWork, Shapes, shapes_of
from megatron_sorted.settings.derived import padded_vocab_size
from megatron_sorted.settings.run import Settings


@dataclass(frozen=True)
class Operations:
    """Of one micro-batch in one chunk on one rank.

    Attributes:
        forward: Layers' products with their matrices.
        forward_attention: Queries with keys and probabilities with values, over all pairs of tokens.
        backward, backward_attention: Of their backward.
        recompute, recompute_attention: What backward computes again.
        exits: Norm to loss to gradients of all exits that train, in backward.
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
        """Return all of them."""
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
    """Return how many of a chunk's layers full recomputation runs again; Megatron counts anew in every segment."""
    if settings.recompute_granularity != "full":
        return 0
    if settings.recompute_method == "uniform":
        return sum(segments)
    return sum(min(settings.recompute_num_layers, layers) for layers in segments)


def real_rows(settings: Settings, vocab_size: int, tensor_rank: int) -> int:
    """Return the rows of the output matrix on a tensor parallel rank that are tokens and no padding."""
    rows = padded_vocab_size(vocab_size, settings) // settings.tensor_model_parallel_size
    return max(0, min(rows, vocab_size - rows * tensor_rank))


def exit_operations(settings: Settings, vocab_size: int, depth: int, tensor_rank: int = 0) -> int:
    """Return the operations of one exit that trains, of one micro-batch: logits, gradients to their input and to the matrix; parts
    forward and backward."""
    tokens = settings.micro_batch_size * settings.seq_length
    shapes = shapes_of(settings, vocab_size)
    total = 3 * 2 * tokens * shapes.hidden * real_rows(settings, vocab_size, tensor_rank)
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
    """Return the operations of one micro-batch; exits that do not train cost nothing."""
    shapes = shapes_of(settings, vocab_size)
    tokens = settings.micro_batch_size * settings.seq_length
    forward, attention = 2 * tokens * shapes.products(), _attention(settings, shapes)
    again = recomputed_layers(settings, work.segments)
    selective = settings.recompute_modules if settings.recompute_granularity == "selective" else ()
    recompute = again * forward + work.num_layers * (
        "mlp" in selective
    ) * 2 * tokens * shapes.products(with_attention=False)
    return Operations(
        forward=work.num_layers * forward,
        forward_attention=work.num_layers * attention,
        backward=2 * work.num_layers * forward,
        backward_attention=2 * work.num_layers * attention,
        recompute=recompute,
        recompute_attention=(again + work.num_layers * ("core_attn" in selective)) * attention,
        exits=sum(
            exit_operations(settings, vocab_size, depth, tensor_rank) for depth in work.trained
        ),
    )
