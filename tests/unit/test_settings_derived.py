"""Values that follow from settings, worked out by hand."""

from dataclasses import replace

import pytest

from megatron_sorted.errors import SettingsError
from megatron_sorted.settings import derived
from megatron_sorted.settings.run import Settings

BASE = Settings()


@pytest.mark.parametrize(
    ("words", "width"),
    [
        ({"hidden_size": 4096}, 10944),  # 8/3 x 4096 = 10922.7 -> 171 x 64
        ({"hidden_size": 192}, 512),  # 8/3 x 192 = 512 exactly
        ({"hidden_size": 256, "swiglu": False}, 1024),
        ({"hidden_size": 256, "ffn_hidden_size": 100}, 100),
    ],
)
def test_width_of_the_mlp(words, width):
    assert derived.ffn_hidden_size(replace(BASE, **words)) == width


def test_heads():
    assert derived.kv_channels(BASE) == 32
    assert derived.kv_channels(replace(BASE, kv_channels=48)) == 48
    assert derived.num_query_groups(BASE) == 8
    assert derived.num_query_groups(replace(BASE, group_query_attention=True, num_query_groups=2)) == 2
    assert derived.max_position_embeddings(BASE) == 256
    assert derived.max_position_embeddings(replace(BASE, max_position_embeddings=512)) == 512


@pytest.mark.parametrize(("vocab_size", "tp", "rows"), [(32000, 1, 32000), (32001, 1, 32128), (1, 4, 512), (512, 4, 512), (513, 4, 1024)])
def test_the_vocabulary_is_padded_upwards(vocab_size, tp, rows):
    assert derived.padded_vocab_size(vocab_size, replace(BASE, tensor_model_parallel_size=tp)) == rows


def test_batch():
    settings = replace(BASE, tensor_model_parallel_size=2, pipeline_model_parallel_size=2, context_parallel_size=2, micro_batch_size=3)
    assert derived.data_parallel_size(settings, 32) == 4
    assert derived.global_batch_size(settings, 32) == 12
    assert derived.num_micro_batches(settings, 32) == 1
    settings = replace(settings, global_batch_size=60)
    assert derived.global_batch_size(settings, 32) == 60
    assert derived.num_micro_batches(settings, 32) == 5


def test_chunks():
    assert derived.num_virtual_chunks(BASE) == 1
    settings = replace(BASE, pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2)
    assert derived.num_virtual_chunks(settings) == 2
    assert derived.layers_of_chunks(settings) == [(0, 0, 0, 2), (1, 0, 2, 2), (0, 1, 4, 2), (1, 1, 6, 2)]
    settings = replace(BASE, pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=3)
    assert derived.layers_of_chunks(settings) == [(0, 0, 0, 3), (1, 0, 3, 5)]


def test_exits():
    settings = replace(BASE, exit_layer_nums=(6, 2), exit_layer_weight=(0.6, 0.2))
    rule = derived.coefficient_rule(settings)
    assert derived.exit_depths(settings) == (2, 6, 8)
    assert derived.trained_exits(settings, rule, 0) == {2: 0.2, 6: 0.6, 8: 1.0}
    assert derived.exit_probabilities(settings) == {2: 1 / 3, 6: 1 / 3, 8: 1 / 3}
    settings = replace(settings, exit_sampling="probabilities", exit_probabilities=(1.0, 0.0, 0.0))
    assert derived.exit_probabilities(settings) == {6: 1.0, 2: 0.0, 8: 0.0}
    assert derived.trained_exits(settings, rule, 0) == {6: 0.6}
    settings = replace(settings, exit_layer_weight=())
    assert derived.trained_exits(settings, derived.coefficient_rule(settings), 0) == {6: 1.0}


def test_shares_of_the_data():
    assert derived.split_shares(BASE) == (0.98, 0.02)
    assert derived.split_shares(replace(BASE, split="3, 1")) == (0.75, 0.25)


@pytest.mark.parametrize("split", ["", "98", "98,1,1", "98,0", "-1,2", "a,b", "nan,1", "inf,1"])
def test_shares_that_are_not_two_positive_numbers_are_refused(split):
    with pytest.raises(SettingsError, match="is not two positive shares"):
        derived.split_shares(replace(BASE, split=split))
