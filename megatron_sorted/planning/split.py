"""Splits of the layers over stages and model chunks that balance layers against exits."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, groupby, pairwise

from megatron_sorted.planning.operations import exit_operations
from megatron_sorted.planning.work import shapes_of, trained_depths
from megatron_sorted.settings.run import Settings


def weights_of_layers(settings: Settings, vocab_size: int) -> list[float]:
    """Return the cost of each layer, with the exit after it if one trains there. Unit: layers.

    Attention counts as causal kernels compute it.
    """
    shapes = shapes_of(settings, vocab_size)
    tokens = settings.micro_batch_size * settings.seq_length
    layer = 2 * tokens * (shapes.products() + settings.seq_length * shapes.query)
    again = 4 if settings.recompute_granularity == "full" else 3
    weights = [1.0] * settings.num_layers
    for depth in trained_depths(settings):
        weights[depth - 1] += exit_operations(settings, vocab_size, depth) / (again * layer)
    return weights


def balanced_parts(weights: Sequence[float], num_parts: int) -> list[int]:
    """Return lengths of consecutive parts, none empty, with the smallest possible largest sum.

    >>> balanced_parts([1, 1, 1, 3], 2)
    [3, 1]
    """
    sums = [0.0, *accumulate(weights)]
    count = len(weights)
    best = [(sums[end], 0) for end in range(count + 1)]
    rows = [best]
    for part in range(2, num_parts + 1):
        new = [(float("inf"), 0)] * (count + 1)
        for end in range(part, count + 1):
            new[end] = min(
                (max(best[cut][0], sums[end] - sums[cut]), cut) for cut in range(part - 1, end)
            )
        rows.append(new)
        best = new
    lengths, end = [], count
    for part in range(num_parts - 1, -1, -1):
        cut = rows[part][end][1]
        lengths.append(end - cut)
        end = cut
    return lengths[::-1]


def _cost(
    sums: Sequence[float], lengths: Sequence[int], num_stages: int
) -> tuple[float, float, float]:
    """Return the cost of a split: the heaviest stage, then unevenness, then the heaviest chunk.

    Unevenness finds improving moves while the heaviest stage stays the same.

    Args:
        sums: Running sums of the layers' weights.
        lengths: Number of layers of each chunk.
        num_stages: Number of stages.
    """
    ends = [0, *accumulate(lengths)]
    chunks = [sums[end] - sums[start] for start, end in pairwise(ends)]
    stages = [sum(chunks[stage::num_stages]) for stage in range(num_stages)]
    return round(max(stages), 6), round(sum(weight * weight for weight in stages), 6), max(chunks)


def balanced_split(weights: Sequence[float], num_stages: int, num_chunks: int) -> list[int]:
    """Return the layers of every chunk that make the heaviest stage as light as possible.

    Chunks are in the order in which a token passes them. With one chunk on each stage no split is
    better. With several, layers are moved between chunks at most one round of stages apart until no
    move helps, from balanced chunks and from equal ones.
    """
    parts = balanced_parts(weights, num_stages * num_chunks)
    if num_chunks == 1:
        return parts
    sums, count = [0.0, *accumulate(weights)], len(weights)
    share, rest = divmod(count, len(parts))
    equal = [share + (place < rest) for place in range(len(parts))]
    return min(
        (_descend(sums, start, num_stages) for start in (parts, equal)),
        key=lambda lengths: _cost(sums, lengths, num_stages),
    )


def _descend(sums: Sequence[float], lengths: list[int], num_stages: int) -> list[int]:
    """Return the split after moving one layer at a time, the best move first, until none helps."""
    while True:
        moved = []
        for source in (place for place, count in enumerate(lengths) if count > 1):
            for target in range(
                max(0, source - num_stages), min(len(lengths), source + num_stages + 1)
            ):
                if source != target:
                    other = list(lengths)
                    other[source] -= 1
                    other[target] += 1
                    moved.append((_cost(sums, other, num_stages), other))
        best = min(moved, default=None)
        if best is None or best[0] >= _cost(sums, lengths, num_stages):
            return lengths
        lengths = best[1]


def layout_text(lengths: Sequence[int]) -> str:
    """Return the numbers of layers as ``--pipeline-model-parallel-layout`` takes them."""

    def layers(count: int) -> str:
        return "t" if count == 1 else f"t*{count}"

    *body, last = lengths  # after the last chunk there is no border
    runs = [(count, len(list(group))) for count, group in groupby(body)]
    return (
        "E"
        + "".join(
            f"({layers(count)}|)*{times}" if times > 1 else f"{layers(count)}|"
            for count, times in runs
        )
        + f"{layers(last)}L"
    )


def with_split(settings: Settings, lengths: Sequence[int]) -> Settings:
    """Return the settings with these numbers of layers on their chunks."""
    return replace(
        settings,
        pipeline_model_parallel_layout=layout_text(lengths),
        num_layers_per_virtual_pipeline_stage=None,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
    )
