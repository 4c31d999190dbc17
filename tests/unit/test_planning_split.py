"""Splits of layers against trying all of them."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from megatron_sorted.planning.devices import DEVICES
from megatron_sorted.planning.estimate import make_plan
from megatron_sorted.planning.operations import operations_of_chunk
from megatron_sorted.planning.split import (
    balanced_parts,
    balanced_split,
    layout_text,
    weights_of_layers,
    with_split,
)
from megatron_sorted.settings.placement import layers_of_layout
from megatron_sorted.settings.run import Settings

WEIGHTS = [1, 1, 1.7, 1, 1, 1.7, 1, 1, 1, 1.7]


def heaviest(weights, lengths, stages):
    """Return the weight of the heaviest stage."""
    parts, start = [], 0
    for length in lengths:
        parts.append(sum(weights[start : start + length]))
        start += length
    return max(sum(parts[stage::stages]) for stage in range(stages))


def all_splits(count, parts):
    """Yield all splits of ``count`` layers into consecutive parts."""
    for cuts in combinations(range(1, count), parts - 1):
        ends = [0, *cuts, count]
        yield [b - a for a, b in pairwise(ends)]


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 10])
def test_no_split_is_better_than_the_balanced_one(parts):
    lengths = balanced_parts(WEIGHTS, parts)
    assert sum(lengths) == 10 and len(lengths) == parts and min(lengths) >= 1
    best = min(heaviest(WEIGHTS, split, parts) for split in all_splits(10, parts))
    assert heaviest(WEIGHTS, lengths, parts) == pytest.approx(best)


@pytest.mark.parametrize(("stages", "chunks"), [(2, 2), (2, 3), (4, 2)])
def test_no_move_of_one_layer_makes_chunks_better_and_few_splits_are(stages, chunks):
    lengths = balanced_split(WEIGHTS, stages, chunks)
    every = sorted(heaviest(WEIGHTS, split, stages) for split in all_splits(10, stages * chunks))
    assert len(lengths) == stages * chunks and sum(lengths) == 10
    assert heaviest(WEIGHTS, lengths, stages) <= every[len(every) // 10]


@pytest.mark.parametrize(
    "lengths", [[3], [1, 2], [4, 4, 4, 2], [5, 4, 4, 4], [1, 1, 1], [2, 2, 3, 3, 3, 1]]
)
def test_layouts_are_read_back(lengths):
    assert layers_of_layout(layout_text(lengths)) == lengths


NESTED = Settings(
    num_layers=32,
    hidden_size=1024,
    num_attention_heads=16,
    seq_length=1024,
    vocab_size=32000,
    mock_data=True,
    untie_embeddings_and_output_weights=True,
    pipeline_model_parallel_size=4,
    global_batch_size=16,
)


@pytest.mark.parametrize(
    ("exits", "num_layers"), [((8, 16, 24), 32), ((10, 20, 30), 40), ((6, 14, 22), 32)]
)
def test_exits_on_every_stage_leave_the_slowest_within_two_percent_of_the_mean(exits, num_layers):
    settings = replace(NESTED, exit_layer_nums=exits, num_layers=num_layers)
    lengths = balanced_split(weights_of_layers(settings, 32000), 4, 1)
    plan = make_plan(with_split(settings, lengths), 32000, 4, DEVICES["A100"], 2048)
    assert all(chunk.exits for stage in plan.stages for chunk in stage.chunks)
    assert plan.imbalance < 1.02
    # a plain model on equal stages has its one head on the last of them
    assert (
        make_plan(replace(settings, exit_layer_nums=()), 32000, 4, DEVICES["A100"], 2048).imbalance
        > 1.05
    )


def test_stages_with_many_exits_get_few_layers():
    # One head costs as much as a layer: 36 layers and 4 exits are 40 layers, 10 for each stage.
    settings = replace(
        NESTED,
        num_layers=36,
        exit_layer_nums=(2, 4, 6),
        seq_length=64,
        vocab_size=4 * 1024 + 3 * 2752 + 64,
    )
    vocabulary = settings.vocab_size
    lengths = balanced_split(weights_of_layers(settings, vocabulary), 4, 1)
    assert lengths == [7, 10, 10, 9]
    split, equal = (
        make_plan(each, vocabulary, 4, DEVICES["A100"], 2048)
        for each in (with_split(settings, lengths), settings)
    )
    assert split.imbalance < 1.02 and equal.imbalance == pytest.approx(12 / 10, rel=0.01)
    assert split.seconds < equal.seconds
    [work] = [operations_of_chunk(settings, chunk, vocabulary) for chunk in split.stages[0].chunks]
    assert work.exits == pytest.approx(3 * 3 * work.forward / 7, rel=0.02)
