"""Values that follow from settings, computed by hand."""

from dataclasses import replace

import pytest

from megatron_sorted.errors import SettingsError
from megatron_sorted.settings import derived
from megatron_sorted.settings.coefficient_rule import coefficient_rule
from megatron_sorted.settings.run import Settings

BASE = Settings()


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({"hidden_size": 4096}, 10944),  # 8/3 x 4096 = 10922.7 -> 171 x 64
        ({"hidden_size": 192}, 512),  # 8/3 x 192 = 512 exactly
        ({"hidden_size": 256, "swiglu": False}, 1024),
        ({"hidden_size": 256, "ffn_hidden_size": 100}, 100),
    ],
)
def test_width_of_the_mlp(changes, width):
    assert derived.ffn_hidden_size(replace(BASE, **changes)) == width


def test_heads():
    assert derived.kv_channels(BASE) == 32
    assert derived.kv_channels(replace(BASE, kv_channels=48)) == 48
    assert derived.num_query_groups(BASE) == 8
    assert (
        derived.num_query_groups(replace(BASE, group_query_attention=True, num_query_groups=2)) == 2
    )
    assert derived.max_position_embeddings(BASE) == 256
    assert derived.max_position_embeddings(replace(BASE, max_position_embeddings=512)) == 512


@pytest.mark.parametrize(
    ("vocab_size", "tp", "rows"),
    [(32000, 1, 32000), (32001, 1, 32128), (1, 4, 512), (512, 4, 512), (513, 4, 1024)],
)
def test_the_vocabulary_is_padded_upwards(vocab_size, tp, rows):
    assert (
        derived.padded_vocab_size(vocab_size, replace(BASE, tensor_model_parallel_size=tp)) == rows
    )


def test_batch():
    settings = replace(
        BASE,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        context_parallel_size=2,
        micro_batch_size=3,
    )
    assert derived.data_parallel_size(settings, 32) == 4
    assert derived.global_batch_size(settings, 32) == 12
    assert derived.num_micro_batches(settings, 32) == 1
    settings = replace(settings, global_batch_size=60)
    assert derived.global_batch_size(settings, 32) == 60
    assert derived.num_micro_batches(settings, 32) == 5
    assert (
        derived.samples_per_step(settings, 4) == 60
        and derived.samples_per_step(replace(settings, global_batch_size=None), 4) == 12
    )


def test_exits():
    settings = replace(BASE, exit_layer_nums=(6, 2), exit_layer_weight=(0.6, 0.2))
    rule = coefficient_rule(settings)
    assert derived.exit_depths(settings) == (2, 6, 8)
    assert derived.trained_exits(settings, rule, 0) == {2: 0.2, 6: 0.6, 8: 1.0}
    assert derived.exit_probabilities(settings) == {2: 1 / 3, 6: 1 / 3, 8: 1 / 3}
    settings = replace(settings, exit_sampling="probabilities", exit_probabilities=(1.0, 0.0, 0.0))
    assert derived.exit_probabilities(settings) == {6: 1.0, 2: 0.0, 8: 0.0}
    assert derived.trained_exits(settings, rule, 0) == {6: 0.6}
    settings = replace(settings, exit_layer_weight=())
    assert derived.trained_exits(settings, coefficient_rule(settings), 0) == {6: 1.0}


@pytest.mark.parametrize(
    ("changes", "ranges"),
    [
        ({}, ((0, 0.98), (0.98, 1), (1, 1))),
        ({"split": "3, 1"}, ((0, 0.75), (0.75, 1), (1, 1))),
        ({"split": "969,30,1"}, ((0, 0.969), (0.969, 0.999), (0.999, 1))),
        ({"split": "7"}, ((0, 1), (1, 1), (1, 1))),
        ({"split": "100,0"}, ((0, 1), (1, 1), (1, 1))),
        ({"split": "3,0,1"}, ((0, 0.75), (0.75, 0.75), (0.75, 1))),
        ({"test_data_path": ("t",)}, ((0, 0.98), (0.98, 1), (1, 1))),
        ({"valid_data_path": ("v",), "split": "1,1"}, ((0, 1), (1, 1), (1, 1))),
    ],
)
def test_shares_of_the_data(changes, ranges):
    assert derived.split_ranges(replace(BASE, **changes)) == ranges


@pytest.mark.parametrize(
    "split", ["", "0,1", "0", "1,1,1,1", "-1,2", "2,-1", "a,b", "nan,1", "1,nan", "inf,1", "1,inf"]
)
def test_shares_that_cannot_be_are_refused(split):
    with pytest.raises(SettingsError, match="is not one to three shares"):
        derived.split_ranges(replace(BASE, split=split))


@pytest.mark.parametrize(
    ("flag", "field"),
    [("--valid-data-path", "valid_data_path"), ("--test-data-path", "test_data_path")],
)
def test_a_test_share_beside_data_of_its_own_is_refused(flag, field):
    with pytest.raises(
        SettingsError, match=f"--split: '98,1,1' takes a test share .* combined with {flag}"
    ):
        derived.split_ranges(replace(BASE, split="98,1,1", **{field: ("x",)}))


def test_a_blend_alternates_weights_and_prefixes():
    blend = replace(BASE, data_path=("0.3", "a", "7e-1", "b/2"))
    assert derived.data_blend(blend) == ((0.3, "a"), (0.7, "b/2")) and derived.data_prefixes(
        blend
    ) == ("a", "b/2")
    assert derived.data_blend(replace(BASE, data_path=("2", "./3"))) == ((2.0, "./3"),)
    for plain in ((), ("a",), ("a", "b", "nan")):
        settings = replace(BASE, data_path=plain)
        assert derived.data_blend(settings) is None and derived.data_prefixes(settings) == plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("0.3", "a", "b"), "mixes prefixes"),
        (("a", "0.3"), "mixes prefixes"),
        (("0.3", "a", "0.7"), "a weight without a prefix"),
        (("0.3", "0.7", "a", "b"), "mixes prefixes"),
        (("1",), "a weight without a prefix"),
        (("a", "b", "0.5", "c"), "mixes prefixes"),
        (("0", "a", "1", "b"), "weight 0 of a is not above 0"),
        (("-0.5", "a", "1", "b"), "weight -0.5 of a is not above 0"),
        (("1e999", "a", "1", "b"), "weight inf of a is not above 0"),
        (("1e-9", "a", "1", "b"), "weight 1e-09 of a is a share of 1e-09"),
        (("0.5", "a", "0.5", "a"), "a is listed twice in the blend"),
    ],
)
def test_blends_that_cannot_be_are_refused(changes, message):
    with pytest.raises(SettingsError, match=message):
        derived.data_blend(replace(BASE, data_path=changes))


def test_the_frozen_last_exit_counts_0_and_the_others_share_the_whole():
    settings = replace(BASE, num_layers=8, exit_layer_nums=(2, 4), use_exit_norm=True)
    rule = coefficient_rule(settings)
    assert derived.step_coefficients(settings, rule, 0) == dict.fromkeys((2, 4, 8), 1 / 3)
    tuned = replace(settings, tune_exit=True)
    assert derived.step_coefficients(tuned, rule, 0) == {2: 0.5, 4: 0.5, 8: 0.0}
    assert derived.trained_exits(tuned, rule, 0) == {2: 0.5, 4: 0.5}
    listed = replace(tuned, exit_layer_weight=(0.3, 0.1))
    assert derived.trained_exits(listed, coefficient_rule(listed), 0) == {2: 0.3, 4: 0.1}
    assert derived.deepest_layer_run(tuned, (2, 4)) == 4
    overlapped = replace(tuned, overlap_grad_reduce=True)
    assert derived.deepest_layer_run(overlapped, (2,)) == 4, (
        "the parts of exit 4 must be reached too"
    )
    assert derived.deepest_layer_run(replace(tuned, pipeline_model_parallel_size=2), (2,)) == 8
