"""Which pipeline stage and model chunk of a run holds which layers, exits, norms and heads."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from megatron_sorted.settings.derived import exit_depths, last_exit_teaches, padded_vocab_size
from megatron_sorted.settings.placement import check_chunks, layers_of_layout, split_layers
from megatron_sorted.settings.run import Settings


@dataclass(frozen=True)
class ChunkLayout:
    """What one model chunk of one pipeline stage holds.

    Attributes:
        stage, chunk: The chunk's position; a token passes chunk 0 of every stage, then chunk 1.
        layers_before: The number of layers before the chunk; it runs depths layers_before + 1 ..
            layers_through.
        num_layers: The number of its layers.
        exits: The depths of its exits, increasing. A depth belongs to the chunk that runs its last
            layer.
        segments: The numbers of layers between exits.
        has_embedding, is_last: Whether the network begins and ends with this chunk.
        owns_norm: Whether it holds its stage's copy of the final norm that exits share.
        owns_head: Whether it holds its stage's copy of the shared output matrix, which is the
            embedding itself where both are tied and the embedding is here.
        exit_norms, exit_heads: The depths of the exits with a norm and with an output matrix of
            their own.
    """

    stage: int
    chunk: int
    layers_before: int
    num_layers: int
    exits: tuple[int, ...]
    segments: tuple[int, ...]
    has_embedding: bool
    is_last: bool
    owns_norm: bool
    owns_head: bool
    exit_norms: tuple[int, ...]
    exit_heads: tuple[int, ...]

    @property
    def layers_through(self) -> int:
        """Return the depth at which the chunk ends."""
        return self.layers_before + self.num_layers

    @property
    def intermediate(self) -> tuple[int, ...]:
        """Return the depths of its exits without the network's last one."""
        return self.exits[:-1] if self.is_last else self.exits


@dataclass(frozen=True)
class Layout:
    """What every chunk of every stage holds.

    Attributes:
        num_stages: The number of pipeline stages.
        chunks: The chunks in the order in which a token passes them.
    """

    num_stages: int
    chunks: tuple[ChunkLayout, ...]

    @property
    def num_chunks(self) -> int:
        """Return the number of chunks of every stage; 1 where the schedule is not interleaved."""
        return len(self.chunks) // self.num_stages

    @property
    def depths(self) -> tuple[int, ...]:
        """Return the depths of all exits, increasing."""
        return tuple(depth for chunk in self.chunks for depth in chunk.exits)

    def of_stage(self, stage: int) -> tuple[ChunkLayout, ...]:
        """Return the chunks of one stage."""
        return tuple(chunk for chunk in self.chunks if chunk.stage == stage)

    def chunk_at(self, depth: int) -> ChunkLayout:
        """Return the chunk that runs the last layer of ``depth``."""
        return next(c for c in self.chunks if c.layers_before < depth <= c.layers_through)

    @property
    def copies(self) -> dict[str, tuple[int, ...]]:
        """Return the stages with a copy of the shared output matrix ("head") and norm ("norm")."""
        return {
            "head": tuple(sorted(chunk.stage for chunk in self.chunks if chunk.owns_head)),
            "norm": tuple(sorted(chunk.stage for chunk in self.chunks if chunk.owns_norm)),
        }


def layers_of_chunks(settings: Settings) -> list[int]:
    """Return the number of layers of every chunk, in the order in which a token passes them.

    Raises:
        SettingsError: The layers do not divide over stages and chunks, or their number is not that
            of the given layout.
    """
    stages, given = settings.pipeline_model_parallel_size, settings.pipeline_model_parallel_layout
    if given is not None:
        layers = layers_of_layout(given)
        check_chunks(layers, settings.num_layers, stages)
        return layers
    return split_layers(
        settings.num_layers,
        stages,
        num_virtual_chunks(settings),
        settings.decoder_first_pipeline_num_layers,
        settings.decoder_last_pipeline_num_layers,
    )


def num_virtual_chunks(settings: Settings) -> int:
    """Return the number of chunks of every stage; 1 where the schedule is not interleaved."""
    stages = settings.pipeline_model_parallel_size
    if settings.pipeline_model_parallel_layout is not None:
        return len(layers_of_layout(settings.pipeline_model_parallel_layout)) // stages
    per_chunk = settings.num_layers_per_virtual_pipeline_stage
    return 1 if per_chunk is None else settings.num_layers // stages // per_chunk


def layout_of(settings: Settings, depths: Iterable[int] | None = None) -> Layout:
    """Return what every chunk holds.

    Args:
        settings: The run; ``check_settings`` has passed it.
        depths: The exits; by default those of the settings.
    """
    depths = sorted(exit_depths(settings) if depths is None else depths)
    stages, last = settings.pipeline_model_parallel_size, settings.num_layers
    tied, taught = not settings.untie_embeddings_and_output_weights, last_exit_teaches(settings)
    chunks, first = [], 0
    for position, layers in enumerate(layers_of_chunks(settings)):
        end = first + layers
        exits = tuple(depth for depth in depths if first < depth <= end)
        own = tuple(depth for depth in exits if depth != last)
        norms = own if settings.use_exit_norm else ()
        heads = own if settings.untie_exit_output_weights else ()
        ends = sorted({0, layers, *(depth - first for depth in exits)})
        earlier = [chunk for chunk in chunks if chunk.stage == position % stages]
        reads_norm = len(norms) < len(exits)
        reads_head = len(heads) < len(exits) or bool(exits and taught) or (tied and first == 0)
        chunks.append(
            ChunkLayout(
                stage=position % stages,
                chunk=position // stages,
                layers_before=first,
                num_layers=layers,
                exits=exits,
                segments=tuple(end - start for start, end in pairwise(ends)),
                has_embedding=first == 0,
                is_last=end == last,
                owns_norm=reads_norm and not any(chunk.owns_norm for chunk in earlier),
                owns_head=reads_head and not any(chunk.owns_head for chunk in earlier),
                exit_norms=norms,
                exit_heads=heads,
            )
        )
        first = end
    return Layout(stages, tuple(chunks))


def vocabulary_rows(settings: Settings, vocab_size: int, tensor_rank: int) -> range:
    """Return the token ids whose vocabulary rows a tensor parallel rank holds.

    These are rows of the embedding and of output matrices. Rows that only pad the vocabulary are
    left out, so the last ranks may hold fewer, or none.

    Args:
        settings: The run.
        vocab_size: Number of real tokens, before padding.
        tensor_rank: The rank within its tensor parallel group.
    """
    rows = padded_vocab_size(vocab_size, settings) // settings.tensor_model_parallel_size
    first = rows * tensor_rank
    return range(first, max(first, min(first + rows, vocab_size)))
