"""Layers, exits and parameters of every model chunk on one rank."""

from dataclasses import dataclass, replace

from megatron_sorted.errors import SettingsError
from megatron_sorted.settings.coefficient_rule import coefficient_rule
from megatron_sorted.settings.derived import (
    exit_depths,
    max_position_embeddings,
    padded_vocab_size,
    step_coefficients,
)
from megatron_sorted.settings.layout import ChunkLayout, layout_of
from megatron_sorted.settings.matrices import LayerShapes, layer_shapes
from megatron_sorted.settings.run import Settings


@dataclass(frozen=True)
class ChunkWork(ChunkLayout):
    """Layers and exits of one model chunk.

    Attributes:
        trained: Depths of the exits that train.
    """

    trained: tuple[int, ...]


LEFT_OUT = {
    "exit_kd_weight": "the plan is that of the same run without teachers, "
    "which sends and keeps less",
    "tune_exit": "the plan is that of training the whole network, which takes more",
}
"""Settings that a plan leaves out -> what it plans instead."""


def element_bytes(settings: Settings) -> int:
    """Return the size of a parameter and of an element of a hidden state."""
    return 2 if settings.bf16 or settings.fp16 else 4


def without_uncounted(settings: Settings) -> tuple[Settings, list[str]]:
    """Return the settings without those that a plan leaves out, and a note for each of these."""
    plain, notes = Settings(), []
    for name, meaning in LEFT_OUT.items():
        if (value := getattr(settings, name)) != getattr(plain, name):
            notes.append(f"note: --{name.replace('_', '-')} {value} is not counted: {meaning}")
            settings = replace(settings, **{name: getattr(plain, name)})
    return settings, notes


def check_plannable(settings: Settings) -> None:
    """Check that a plan counts everything that the settings request.

    Raises:
        SettingsError: It does not.
    """
    plain = Settings()
    for name in (
        "num_experts",
        "lora_rank",
        *LEFT_OUT,
        "context_parallel_size",
        "exit_adapter_rank",
    ):
        value = getattr(settings, name)
        if value != getattr(plain, name):
            raise SettingsError(
                f"--{name.replace('_', '-')}: {value} is not counted by a plan. "
                "Leave it out to plan the rest of the run."
            )


def trained_depths(settings: Settings) -> tuple[int, ...]:
    """Return the depths of the exits that train: those with a coefficient at the end of the run."""
    rule = coefficient_rule(settings)
    coefficients = step_coefficients(settings, rule, max(settings.train_iters - 1, 0))
    return tuple(depth for depth in exit_depths(settings) if coefficients[depth] > 0)


def work_of_chunks(settings: Settings) -> list[ChunkWork]:
    """Return the work of every model chunk, in the order in which a token passes them."""
    trained = set(trained_depths(settings))
    return [
        ChunkWork(**vars(chunk), trained=tuple(depth for depth in chunk.exits if depth in trained))
        for chunk in layout_of(settings).chunks
    ]


@dataclass(frozen=True)
class Shapes(LayerShapes):
    """Widths on one tensor parallel rank.

    Attributes:
        vocabulary: Number of rows of embedding and head.
    """

    vocabulary: int


def shapes_of(settings: Settings, vocab_size: int) -> Shapes:
    """Return the widths on one tensor parallel rank, for ``vocab_size`` real tokens."""
    tp = settings.tensor_model_parallel_size
    return Shapes(
        **vars(layer_shapes(settings, tp)), vocabulary=padded_vocab_size(vocab_size, settings) // tp
    )


def parameters_on_rank(settings: Settings, work: ChunkWork, vocab_size: int) -> dict[str, int]:
    """Return {kind: number of parameters} of a model chunk on one rank."""
    shapes, own = shapes_of(settings, vocab_size), len(work.intermediate)
    matrix = shapes.vocabulary * shapes.hidden
    embedding = matrix * work.has_embedding
    if work.has_embedding and settings.position_embedding_type == "learned_absolute":
        embedding += max_position_embeddings(settings) * shapes.hidden
    tied_here = work.has_embedding and not settings.untie_embeddings_and_output_weights
    parts = own * shapes.parameters(settings) * settings.use_exit_block
    parts += own * shapes.parameters(settings, with_attention=False) * settings.use_exit_mlp
    return {
        "layers": work.num_layers * shapes.parameters(settings),
        "embedding": embedding,
        "norms": shapes.norm * (work.owns_norm + len(work.exit_norms)),
        "heads": matrix * ((work.owns_head and not tied_here) + len(work.exit_heads)),
        "parts of exits": parts,
    }


def muon_parameters_on_rank(settings: Settings, work: ChunkWork, vocab_size: int) -> int:
    """Return the parameters of a model chunk that Muon updates: matrices of layers and exits."""
    shapes, own = shapes_of(settings, vocab_size), len(work.intermediate)
    sizes = {name: rows * columns for name, (rows, columns) in shapes.matrices.items()}
    mlp = sizes["linear_fc1"] + sizes["linear_fc2"]
    layers = work.num_layers + own * settings.use_exit_block
    return layers * sum(sizes.values()) + own * settings.use_exit_mlp * mlp


def summed_parameters_on_rank(settings: Settings, work: ChunkWork, vocab_size: int) -> int:
    """Return the parameters of a model chunk whose gradients are summed over tensor parallel ranks.

    All these ranks hold them whole. With sequence parallelism these are norms, biases of summed
    products and learned positions; without it norms of queries and keys alone.
    """
    shapes = shapes_of(settings, vocab_size)
    h, blocks = shapes.hidden, len(work.intermediate)
    with_attention = work.num_layers + blocks * settings.use_exit_block
    total = with_attention * shapes.head_norms(settings)
    if settings.sequence_parallel:
        half = shapes.norm * (2 if settings.use_sandwich_norm else 1) + h * (
            not settings.disable_bias_linear
        )
        total += (2 * with_attention + blocks * settings.use_exit_mlp) * half
        total += shapes.norm * (work.owns_norm + len(work.exit_norms))
        if work.has_embedding and settings.position_embedding_type == "learned_absolute":
            total += max_position_embeddings(settings) * h
    return total
