"""Which chunk holds what, against tables written by hand."""

from dataclasses import replace

import pytest

from megatron_sorted.errors import SettingsError
from megatron_sorted.settings.layout import (
    Layout,
    layers_of_chunks,
    layout_of,
    num_virtual_chunks,
    vocabulary_rows,
)
from megatron_sorted.settings.run import Settings

BASE = Settings(num_layers=8, exit_layer_nums=(2, 3, 6), untie_embeddings_and_output_weights=True)
PP2 = replace(BASE, pipeline_model_parallel_size=2)
VPP = replace(PP2, num_layers_per_virtual_pipeline_stage=2)
TIED = {"untie_embeddings_and_output_weights": False}
OWN = {"use_exit_norm": True, "untie_exit_output_weights": True}


def rows(layout: Layout) -> list[tuple]:
    """Return the columns of the tables below for each chunk."""
    return [
        (c.stage, c.chunk, c.layers_before, c.num_layers, c.exits, c.segments)
        for c in layout.chunks
    ]


def owners(layout: Layout) -> dict[str, list[tuple[int, int]]]:
    """Return the (stage, chunk) of the copies of the shared norm and the shared output matrix."""
    return {
        "norm": [(c.stage, c.chunk) for c in layout.chunks if c.owns_norm],
        "head": [(c.stage, c.chunk) for c in layout.chunks if c.owns_head],
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (BASE, [(0, 0, 0, 8, (2, 3, 6, 8), (2, 1, 3, 2))]),
        (PP2, [(0, 0, 0, 4, (2, 3), (2, 1, 1)), (1, 0, 4, 4, (6, 8), (2, 2))]),
        (
            VPP,
            [
                (0, 0, 0, 2, (2,), (2,)),
                (1, 0, 2, 2, (3,), (1, 1)),
                (0, 1, 4, 2, (6,), (2,)),
                (1, 1, 6, 2, (8,), (2,)),
            ],
        ),
        (
            replace(PP2, decoder_first_pipeline_num_layers=3),
            [(0, 0, 0, 3, (2, 3), (2, 1)), (1, 0, 3, 5, (6, 8), (3, 2))],
        ),
        (
            replace(PP2, decoder_last_pipeline_num_layers=1),
            [(0, 0, 0, 7, (2, 3, 6), (2, 1, 3, 1)), (1, 0, 7, 1, (8,), (1,))],
        ),
        (
            replace(PP2, pipeline_model_parallel_layout="Et*3|t|tt|ttL"),
            [
                (0, 0, 0, 3, (2, 3), (2, 1)),
                (1, 0, 3, 1, (), (1,)),
                (0, 1, 4, 2, (6,), (2,)),
                (1, 1, 6, 2, (8,), (2,)),
            ],
        ),
        (
            replace(BASE, pipeline_model_parallel_size=4, exit_layer_nums=()),
            [
                (0, 0, 0, 2, (), (2,)),
                (1, 0, 2, 2, (), (2,)),
                (2, 0, 4, 2, (), (2,)),
                (3, 0, 6, 2, (8,), (2,)),
            ],
        ),
    ],
)
def test_layers_and_exits(settings, expected):
    layout = layout_of(settings)
    assert rows(layout) == expected
    assert [c.has_embedding for c in layout.chunks] == [True, *[False] * (len(expected) - 1)]
    assert [c.is_last for c in layout.chunks] == [*[False] * (len(expected) - 1), True]
    assert (
        layout.num_chunks
        == num_virtual_chunks(settings)
        == len(expected) // settings.pipeline_model_parallel_size
    )
    assert layout.depths == tuple(depth for row in expected for depth in row[4])
    assert layers_of_chunks(settings) == [row[3] for row in expected]
    for depth in range(1, settings.num_layers + 1):
        assert depth in range(
            layout.chunk_at(depth).layers_before + 1, layout.chunk_at(depth).layers_through + 1
        )


@pytest.mark.parametrize(
    ("settings", "norm", "head"),
    [
        (BASE, [(0, 0)], [(0, 0)]),
        (PP2, [(0, 0), (1, 0)], [(0, 0), (1, 0)]),
        (replace(PP2, **OWN), [(1, 0)], [(1, 0)]),
        (
            replace(PP2, **OWN, **TIED),
            [(1, 0)],
            [(0, 0), (1, 0)],
        ),  # the embedding is the first stage's copy
        (
            replace(PP2, **OWN, exit_kd_weight=0.5),
            [(1, 0)],
            [(0, 0), (1, 0)],
        ),  # taught exits read their teacher's matrix
        (replace(PP2, **OWN, exit_kd_weight=0.5, exit_kd_teacher="another"), [(1, 0)], [(1, 0)]),
        (VPP, [(0, 0), (1, 0)], [(0, 0), (1, 0)]),
        (replace(VPP, exit_layer_nums=(6,)), [(0, 1), (1, 1)], [(0, 1), (1, 1)]),
        (replace(VPP, exit_layer_nums=(6,), **TIED), [(0, 1), (1, 1)], [(0, 0), (1, 1)]),
        (replace(VPP, use_exit_norm=True), [(1, 1)], [(0, 0), (1, 0)]),
        (replace(PP2, exit_layer_nums=()), [(1, 0)], [(1, 0)]),
    ],
)
def test_norms_and_output_matrices(settings, norm, head):
    layout = layout_of(settings)
    assert owners(layout) == {"norm": norm, "head": head}
    assert layout.copies == {
        "norm": tuple(sorted(s for s, _ in norm)),
        "head": tuple(sorted(s for s, _ in head)),
    }


def test_what_exits_own():
    first, last = layout_of(replace(PP2, **OWN)).chunks
    assert (first.exit_norms, first.exit_heads, last.exit_norms, last.exit_heads) == (
        (2, 3),
        (2, 3),
        (6,),
        (6,),
    )
    assert (first.intermediate, last.intermediate) == ((2, 3), (6,))
    assert layout_of(VPP).of_stage(1) == (layout_of(VPP).chunks[1], layout_of(VPP).chunks[3])
    assert layout_of(VPP).chunks[0].exit_norms == layout_of(VPP).chunks[0].exit_heads == ()


def test_other_depths_than_the_settings():
    assert [c.exits for c in layout_of(PP2, [4]).chunks] == [(4,), ()]


def test_layers_that_do_not_divide():
    with pytest.raises(SettingsError, match="do not divide"):
        layout_of(replace(PP2, decoder_first_pipeline_num_layers=8))
    with pytest.raises(SettingsError, match="2 chunks with 7 layers"):
        layout_of(replace(PP2, pipeline_model_parallel_layout="Et*3|t*4L"))


def test_rows_of_the_vocabulary():
    settings = replace(BASE, tensor_model_parallel_size=4, make_vocab_size_divisible_by=8)
    # 70 tokens are padded to 96, 24 rows a rank; the last rank holds padding only
    rows = [vocabulary_rows(settings, 70, rank) for rank in range(4)]
    assert [(r.start, len(r)) for r in rows] == [(0, 24), (24, 24), (48, 22), (72, 0)]
