"""Layers on stages and chunks, against hand tables and against megatron-core."""

from dataclasses import replace

import pytest
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_sorted.errors import SettingsError
from megatron_sorted.planning.split import layout_text
from megatron_sorted.settings.layout import layout_of
from megatron_sorted.settings.placement import check_chunks, layers_of_layout, split_layers
from megatron_sorted.settings.run import Settings


def test_layers_of_two_stages_with_two_chunks():
    assert split_layers(8, 2, 2) == [2, 2, 2, 2]


def test_layers_of_stages_of_unequal_size():
    assert split_layers(11, 4, 1, first_stage_layers=2, last_stage_layers=1) == [2, 4, 4, 1]
    assert split_layers(7, 2, 1, first_stage_layers=3) == [3, 4]


@pytest.mark.parametrize(
    ("num_layers", "stages", "chunks", "first", "last"),
    [
        (6, 1, 1, None, None), (8, 2, 1, None, None), (12, 4, 1, None, None),
        (8, 2, 2, None, None), (24, 3, 4, None, None),
        (8, 4, 2, None, None),
        (7, 2, 1, 3, None), (7, 2, 1, None, 3), (7, 2, 1, 3, 4),
        (11, 4, 1, 2, 1), (14, 4, 1, 2, None), (14, 4, 1, None, 2),
        (20, 4, 2, 2, 2), (14, 4, 2, 2, None),
    ],
)  # fmt: skip
def test_layers_are_split_as_megatron_splits_them(num_layers, stages, chunks, first, last):
    config = TransformerConfig(
        num_layers=num_layers, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True,
        pipeline_dtype="unused", pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        num_layers_in_first_pipeline_stage=first, num_layers_in_last_pipeline_stage=last,
    )  # fmt: skip
    settings = Settings(
        num_layers=num_layers,
        pipeline_model_parallel_size=stages,
        decoder_first_pipeline_num_layers=first,
        decoder_last_pipeline_num_layers=last,
        exit_layer_nums=(),
    )
    lengths = split_layers(num_layers, stages, chunks, first, last)
    if chunks > 1:
        settings = replace(settings, pipeline_model_parallel_layout=layout_text(lengths))
    ours = {
        (chunk.stage, chunk.chunk): (chunk.layers_before, chunk.num_layers)
        for chunk in layout_of(settings).chunks
    }
    theirs = {}
    for stage in range(stages):
        for chunk in range(chunks):
            vp_stage = chunk if chunks > 1 else None
            theirs[stage, chunk] = (
                get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=stage),
                get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=stage),
            )
    assert ours == theirs
    assert sum(lengths) == num_layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, 2), "7 layers do not divide over 2 stages"),
        ((2, 4), "2 layers do not divide over 4 stages"),
        ((8, 2, 3), "4 layers on stage 0 do not divide into 3 chunks"),
        ((8, 1, 1, 4), "there is only one stage"),
        ((8, 2, 1, 8), "0 layers are left for 1 stages"),
        ((8, 2, 1, 4, 3), "1 layers are left for 0 stages"),
        ((8, 4, 1, 1, 2), "5 layers are left for 2 stages"),
        ((8, 4, 1, 0), "do not divide"),
    ],
)
def test_layers_that_do_not_divide_are_refused(arguments, message):
    with pytest.raises(SettingsError, match=message):
        split_layers(*arguments)


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("Et*3|t*5|t*5|t*4L", 4),
        ("Et|tt|t*3|tL", 2),
        ("Ettt|(tt|)*3tL", 5),
        ("Et*4|(t*4|)*14t*2L", 4),
        ("E t, | t*2 L", 2),
        ("EtttL", 1),
    ],
)
def test_a_layout_is_read_as_megatron_reads_it(text, stages):
    layouts = pytest.importorskip(
        "megatron.core.transformer.pipeline_parallel_layer_layout",
        reason="megatron-core 0.12 has no layouts",
    )
    layers = layers_of_layout(text)
    ours = layout_of(
        Settings(
            num_layers=sum(layers),
            pipeline_model_parallel_size=stages,
            pipeline_model_parallel_layout=text,
            exit_layer_nums=(),
        )
    ).chunks
    theirs = layouts.PipelineParallelLayerLayout(text.replace(" ", ""), stages)
    places = [(chunk.stage, chunk.chunk) for chunk in ours]
    assert sorted(places) == [(s, c) for s in range(stages) for c in range(len(layers) // stages)]
    counted = {(s, c): theirs.layout[s][c].count(layouts.LayerType.decoder) for s, c in places}
    assert {(c.stage, c.chunk): c.num_layers for c in ours} == counted
    assert [c.layers_before for c in ours] == [
        sum(counted[place] for place in places[:n]) for n in range(len(places))
    ]


@pytest.mark.parametrize(
    "text", ["tt|tt", "Ett|tt", "Ett||ttL", "E|ttL", "Et|mtL", "Et|tL|", "Et*x|tL", ""]
)
def test_a_malformed_layout_is_refused(text):
    with pytest.raises(SettingsError, match="--pipeline-model-parallel-layout"):
        layers_of_layout(text)


@pytest.mark.parametrize(("layers", "num_layers", "stages"), [([2, 2], 5, 2), ([2, 2, 1], 5, 2)])
def test_a_layout_of_other_layers_or_stages_is_refused(layers, num_layers, stages):
    with pytest.raises(
        SettingsError,
        match=f"{len(layers)} chunks with {sum(layers)} layers, but --num-layers is {num_layers}",
    ):
        check_chunks(layers, num_layers, stages)
