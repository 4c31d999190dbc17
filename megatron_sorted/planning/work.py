"""What every chunk holds, and how many parameters that is on one rank."""

from dataclasses import dataclass, replace

from megatron_sorted.errors import SettingsError
from megatron_sorted.exits.placement import place_exits
from megatron_sorted.settings.derived import (
    exit_depths,
    ffn_hidden_size,
    kv_channels,
    layers_of_chunks,
    max_position_embeddings,
    num_query_groups,
    padded_vocab_size,
    step_coefficients,
)
from megatron_sorted.settings.run import Settings
from megatron_sorted.settings.weighting import coefficient_rule


@dataclass(frozen=True)
class ChunkWork:
    """One chunk: its layers, exits and what else it holds.

    Attributes:
        exits: Depths of its exits.
        trained: Those of them that train.
        segments: Numbers of layers between exits.
        owns_norm, owns_head: Whether this chunk holds its rank's copy of the shared final norm and of the shared output matrix.
    """

    stage: int
    chunk: int
    first_layer: int
    num_layers: int
    exits: tuple[int, ...]
    trained: tuple[int, ...]
    segments: tuple[int, ...]
    has_embedding: bool
    is_last: bool
    owns_norm: bool
    owns_head: bool


LEFT_OUT = {
    "exit_kd_weight": "the plan is that of the same run without teachers, which sends and keeps less",
    "tune_exit": "the plan is that of training the whole network, which takes more",
}
"""{setting: what the plan is then of}."""


def element_bytes(settings: Settings) -> int:
    """Returns the size of a parameter and of an element of a hidden state."""
    return 2 if settings.bf16 or settings.fp16 else 4


def without_uncounted(settings: Settings) -> tuple[Settings, list[str]]:
    """Return the settings without what a plan leaves out, and a note for each setting that was left out."""
    plain, notes = Settings(), []
    for name, meaning in LEFT_OUT.items():
        if (value := getattr(settings, name)) != getattr(plain, name):
            notes.append(f"note: --{name.replace('_', '-')} {value} is not counted: {meaning}")
            settings = replace(settings, **{name: getattr(plain, name)})
    return settings, notes


def check_plannable(settings: Settings) -> None:
    """Returns nothing if everything the settings ask for is counted here.

    Raises:
        SettingsError: Something is not.
    """
    plain = Settings()
    for name in ("num_experts", "lora_rank", *LEFT_OUT, "context_parallel_size", "exit_adapter_rank"):
        value = getattr(settings, name)
        if value != getattr(plain, name):
            raise SettingsError(f"--{name.replace('_', '-')}: {value} is not counted by a plan. Leave it out to plan the rest of the run.")


def trained_depths(settings: Settings) -> tuple[int, ...]:
    """Returns the exits that a step trains which trains all that ever do: those with a coefficient at the end of the run."""
    rule = coefficient_rule(settings)
    coefficients = step_coefficients(settings, rule, max(settings.train_iters - 1, 0))
    return tuple(depth for depth in exit_depths(settings) if coefficients[depth] > 0)


def work_of_chunks(settings: Settings) -> list[ChunkWork]:
    """Returns what every chunk holds, in the order in which a token passes them."""
    places, trained = place_exits(exit_depths(settings), layers_of_chunks(settings)), set(trained_depths(settings))
    tied, last = not settings.untie_embeddings_and_output_weights, settings.num_layers
    chunks, with_norm, with_head = [], set(), set()
    for stage, chunk, first, layers in layers_of_chunks(settings):
        exits = tuple(sorted(depth for depth, place in places.items() if (place.stage, place.chunk) == (stage, chunk)))
        reads_norm = any(depth == last or not settings.use_exit_norm for depth in exits)
        reads_head = any(depth == last or not settings.untie_exit_output_weights for depth in exits) or (tied and first == 0)
        ends = sorted({depth - first for depth in exits} | {layers})
        chunks.append(ChunkWork(
            stage, chunk, first, layers, exits, tuple(depth for depth in exits if depth in trained),
            tuple(end - start for start, end in zip([0, *ends], ends, strict=False)), first == 0, first + layers == last,
            reads_norm and stage not in with_norm, reads_head and stage not in with_head))
        with_norm |= {stage} if reads_norm else set()
        with_head |= {stage} if reads_head else set()
    return chunks


@dataclass(frozen=True)
class Shapes:
    """Widths on one tensor parallel rank.

    Attributes:
        norm: Parameters of one norm of the hidden state.
        query, key_value: Widths of all its queries, and of all its keys (or values).
        fc1, ffn: Widths of the MLP's first product and of its second's input.
        vocabulary: Rows of embedding and head.
    """

    hidden: int
    norm: int
    query: int
    key_value: int
    fc1: int
    ffn: int
    vocabulary: int


def shapes_of(settings: Settings, vocab_size: int) -> Shapes:
    """Returns the widths on one tensor parallel rank of a vocabulary of ``vocab_size`` real tokens."""
    tp, h, d = settings.tensor_model_parallel_size, settings.hidden_size, kv_channels(settings)
    ffn = ffn_hidden_size(settings) // tp
    return Shapes(h, h if settings.normalization == "RMSNorm" else 2 * h, settings.num_attention_heads * d // tp,
                  num_query_groups(settings) * d // tp, ffn * (2 if settings.swiglu else 1), ffn,
                  padded_vocab_size(vocab_size, settings) // tp)


def layer_parameters_on_rank(settings: Settings, shapes: Shapes, with_attention: bool = True) -> int:
    """Returns the parameters that one rank holds of a layer, or of one without attention (an exit's MLP)."""
    h = shapes.hidden
    bias = not settings.disable_bias_linear
    norms = 2 if settings.use_sandwich_norm else 1
    total = norms * shapes.norm + h * (shapes.fc1 + shapes.ffn) + (shapes.fc1 + h) * bias
    if with_attention:
        packed = shapes.query + 2 * shapes.key_value
        total += norms * shapes.norm + h * (packed + shapes.query) + packed * (bias or settings.add_qkv_bias) + h * bias
        total += 2 * kv_channels(settings) * (shapes.norm // h) * settings.qk_layernorm
    return total


def parameters_on_rank(settings: Settings, work: ChunkWork, vocab_size: int) -> dict[str, int]:
    """Returns {what: parameters} that one rank holds of a chunk: layers, embedding, norms, heads, parts of exits."""
    shapes, last = shapes_of(settings, vocab_size), settings.num_layers
    own = sum(depth != last for depth in work.exits)
    matrix = shapes.vocabulary * shapes.hidden
    embedding = matrix * work.has_embedding
    if work.has_embedding and settings.position_embedding_type == "learned_absolute":
        embedding += max_position_embeddings(settings) * shapes.hidden
    tied_here = work.has_embedding and not settings.untie_embeddings_and_output_weights
    parts = own * layer_parameters_on_rank(settings, shapes) * settings.use_exit_block
    parts += own * layer_parameters_on_rank(settings, shapes, with_attention=False) * settings.use_exit_mlp
    return {
        "layers": work.num_layers * layer_parameters_on_rank(settings, shapes),
        "embedding": embedding,
        "norms": shapes.norm * (work.owns_norm + own * settings.use_exit_norm),
        "heads": matrix * ((work.owns_head and not tied_here) + own * settings.untie_exit_output_weights),
        "parts of exits": parts,
    }


def summed_parameters_on_rank(settings: Settings, work: ChunkWork, vocab_size: int) -> int:
    """Returns how many parameters of a chunk are the same on all tensor parallel ranks, each of which has a part of their gradient.

    With sequence parallelism those are norms, biases of what is summed and learned positions; without it norms of queries and keys alone.
    """
    shapes = shapes_of(settings, vocab_size)
    h, blocks = shapes.hidden, sum(depth != settings.num_layers for depth in work.exits)
    heads = 2 * kv_channels(settings) * (shapes.norm // h) * settings.qk_layernorm
    with_attention = work.num_layers + blocks * settings.use_exit_block
    total = with_attention * heads
    if settings.sequence_parallel:
        half = shapes.norm * (2 if settings.use_sandwich_norm else 1) + h * (not settings.disable_bias_linear)
        total += (2 * with_attention + blocks * settings.use_exit_mlp) * half
        total += shapes.norm * (work.owns_norm + blocks * settings.use_exit_norm)
        if work.has_embedding and settings.position_embedding_type == "learned_absolute":
            total += max_position_embeddings(settings) * h
    return total
