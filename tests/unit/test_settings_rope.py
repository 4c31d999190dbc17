"""Rules of rotary scaling, and every spelling of its settings."""

import dataclasses
import math

import pytest

from megatron_sorted.conversion.starting_settings import starting_settings
from megatron_sorted.errors import SettingsError
from megatron_sorted.planning.page import rope_lines
from megatron_sorted.settings.load import (
    load_settings,
    settings_as_dict,
    settings_as_yaml,
    settings_from_dict,
)
from megatron_sorted.settings.rope import check_rope
from megatron_sorted.settings.rope_scaling import Rope, rope_of
from megatron_sorted.settings.rules import check_numbers
from megatron_sorted.settings.run import Settings
from tests.support.model_directories import save_model

SCALING = {"rope_scaling_factor": 4.0, "rope_scaling_original_max_position_embeddings": 64}
YARN = {"rope_scaling_type": "yarn", **SCALING}
BAD = [
    (
        {"rope_scaling_type": "yarn", "rope_scaling_factor": 4.0},
        "--rope-scaling-original-max-position-embeddings: not given, and --rope-scaling-type yarn "
        "needs it. Give the context length that the model was first trained with.",
    ),
    (
        {"rope_scaling_type": "dynamic", "rope_scaling_factor": 4.0},
        "--rope-scaling-original-max-position-embeddings: not given, and",
    ),
    (
        {"rope_scaling_type": "linear"},
        "--rope-scaling-factor: not given, and --rope-scaling-type linear needs it. Give how many "
        "times longer texts become.",
    ),
    ({**YARN, "rope_scaling_factor": 0.5}, "--rope-scaling-factor: 0.5 would shorten the context."),
    (
        {**YARN, "rope_scaling_low_freq_factor": 1.0},
        "--rope-scaling-low-freq-factor: 1.0 has no effect with --rope-scaling-type yarn; it is a "
        "parameter of llama3. Give such a type, or leave it out.",
    ),
    (
        {"rope_scaling_type": "llama3", "rope_scaling_truncate": False},
        "--rope-scaling-truncate: False has no effect with --rope-scaling-type llama3",
    ),
    (
        {**YARN, "rope_scaling_beta_fast": 1.0},
        "--rope-scaling-beta-slow: 1.0 is not below --rope-scaling-beta-fast 1.0.",
    ),
    (
        {**YARN, "rope_scaling_attention_factor": 1.2, "rope_scaling_mscale": 1.0},
        "--rope-scaling-attention-factor: 1.2 together with --rope-scaling-mscale",
    ),
    ({**YARN, "rotary_base": 1}, "--rotary-base: 1 gives all channels one frequency"),
    (
        {**YARN, "use_rope_scaling": True},
        "--rope-scaling-type: yarn together with --use-rope-scaling, which means llama3. Give one.",
    ),
    (
        {"rope_scaling_type": "default", "rotary_seq_len_interpolation_factor": 2.0},
        "--rope-scaling-type: default together with --rotary-seq-len-interpolation-factor 2.0",
    ),
    (
        {"rotary_seq_len_interpolation_factor": 2.0, "rope_scaling_factor": 3.0},
        "--rope-scaling-factor: 3.0 together with --rotary-seq-len-interpolation-factor 2.0: two",
    ),
    (
        {**YARN, "seq_length": 257},
        "--seq-length: 257 is more than yarn's 256 tokens (--rope-scaling-factor 4 x --rope-scaling"
        "-original-max-position-embeddings 64). Raise the factor or shorten the samples.",
    ),
    (
        {"rope_scaling_type": "dynamic", **SCALING, "kv_channels": 2},
        "--rope-scaling-type: dynamic spreads its change over the pairs of channels",
    ),
    (
        {"rope_resonance": True, "position_embedding_type": "none"},
        "--rope-resonance: there are no rotary frequencies with --position-embedding-type none.",
    ),
    (
        {**YARN, "position_embedding_type": "learned_absolute"},
        "--rope-scaling-type: there are no rotary frequencies with --position-embedding-type",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_scaling_that_is_not_defined_is_refused(changes, message):
    with pytest.raises(SettingsError) as error:
        check_rope(Settings(**changes))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "name", ["beta_fast", "beta_slow", "mscale", "attention_factor", "mscale_all_dim", "factor"]
)
def test_numbers_out_of_range_are_refused(name):
    with pytest.raises(SettingsError, match=f"--rope-scaling-{name.replace('_', '-')}: -1.0 is"):
        check_numbers(Settings(**{f"rope_scaling_{name}": -1.0}))


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({}, Rope(32, 10000.0)),
        ({"rope_scaling_type": "linear", "rope_scaling_factor": 2.0}, Rope(32, 1e4, "linear", 2.0)),
        ({"rotary_seq_len_interpolation_factor": 2.0}, Rope(32, 1e4, "linear", 2.0)),
        ({"use_rope_scaling": True}, Rope(32, 1e4, "llama3", 8.0, 8192)),
        ({"rope_scaling_type": "llama3"}, Rope(32, 1e4, "llama3", 8.0, 8192)),
        (
            {**YARN, "rotary_percent": 0.5},
            Rope(16, 1e4, "yarn", 4.0, 64, attention_factor=1.138629),
        ),
        (
            {**YARN, "rope_scaling_mscale": 0.7, "rope_scaling_mscale_all_dim": 0.2},
            Rope(32, 1e4, "yarn", 4.0, 64, attention_factor=1.067445),
        ),
        (
            {**YARN, "rope_scaling_attention_factor": 1.5, "rope_scaling_truncate": False},
            Rope(32, 1e4, "yarn", 4.0, 64, truncate=False, attention_factor=1.5),
        ),
        (
            {"rope_scaling_type": "dynamic", **SCALING, "rope_resonance": True},
            Rope(32, 1e4, "dynamic", 4.0, 64, resonance=True),
        ),
    ],
)
def test_the_settings_mean(changes, rope):
    settings = Settings(**changes)
    check_rope(settings)
    got = rope_of(settings)
    assert math.isclose(got.attention_factor, rope.attention_factor, abs_tol=1e-6)
    assert dataclasses.replace(got, attention_factor=rope.attention_factor) == rope


MEGATRON = (
    *("--position-embedding-type", "yarn", "--yarn-rotary-scaling-factor", "4"),
    *("--yarn-original-max-position-embeddings", "64", "--yarn-beta-fast", "16"),
    *("--yarn-beta-slow", "2", "--yarn-mscale", "0.7", "--yarn-mscale-all-dim", "0.5"),
    "--no-yarn-correction-range-round-to-int",
)


def test_megatrons_flags_and_keys_mean_ours(tmp_path):
    expected = Settings(
        **YARN,
        rope_scaling_beta_fast=16.0,
        rope_scaling_beta_slow=2.0,
        rope_scaling_mscale=0.7,
        rope_scaling_mscale_all_dim=0.5,
        rope_scaling_truncate=False,
    )
    assert load_settings(list(MEGATRON)) == expected
    path = tmp_path / "run.yaml"
    path.write_text(
        "position-embedding-type: yarn\nyarn-rotary-scaling-factor: 4.0\n"
        "yarn_original_max_position_embeddings: 64\nyarn-beta-fast: 16.0\nyarn-beta-slow: 2.0\n"
        "yarn-mscale: 0.7\nyarn-mscale-all-dim: 0.5\nyarn-correction-range-round-to-int: false\n"
    )
    assert load_settings(["--config", str(path)]) == expected
    path.write_text(settings_as_yaml(expected))
    assert load_settings(["--config", str(path)]) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--yarn-beta-fast", "3", "--rope-scaling-beta-fast", "3"],
            "--yarn-beta-fast and --rope-scaling-beta-fast: two names of one setting are given.",
        ),
        (
            ["--position-embedding-type", "yarn", "--rope-scaling-type", "llama3"],
            "--position-embedding-type: yarn, together with --rope-scaling-type: llama3. Give one",
        ),
        (["--yarn-beta-fast", "x"], "--yarn-beta-fast: 'x' is not a value of this setting."),
        (
            ["--rope-scaling-type", "yarm"],
            "--rope-scaling-type: 'yarm' is not a value of this setting. Did you mean yarn? Give "
            "one of default, linear, llama3, yarn, dynamic or none.",
        ),
    ],
)
def test_two_names_or_types_are_refused(arguments, message):
    with pytest.raises(SettingsError) as error:
        load_settings(arguments)
    assert str(error.value).startswith(message)


def test_what_older_versions_wrote_for_runs_without_scaling_is_no_scaling():
    old = {
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "rope_scaling_low_freq_factor": 1.0,
        "rope_scaling_high_freq_factor": 4.0,
        "rope_scaling_original_max_position_embeddings": 8192,
    }
    assert settings_from_dict(old) == Settings()
    scaled = settings_from_dict({**old, "use_rope_scaling": True})
    assert rope_of(scaled) == rope_of(Settings(use_rope_scaling=True))
    # one of today's own, with a value that happens to be an old default
    now = Settings(rope_scaling_type="linear", rope_scaling_factor=8.0)
    assert settings_from_dict(settings_as_dict(now)) == now


def test_a_type_that_is_given_replaces_the_models_scaling(tmp_path):
    save_model(tmp_path, "llama3")
    given = {"load": str(tmp_path)}
    kept = Settings(**starting_settings(given))
    assert rope_of(kept).kind == "llama3" and rope_of(kept).context == 16
    for name, value in (
        ("rope_scaling_type", "yarn"),
        ("rotary_seq_len_interpolation_factor", 2.0),
    ):
        taken = starting_settings({**given, name: value})
        assert taken["rotary_base"] == 500000
        assert not any(field.startswith("rope_scaling") for field in taken)
    joined = starting_settings({**given, "rope_resonance": True}) | {"rope_resonance": True}
    assert rope_of(Settings(**joined)) == dataclasses.replace(rope_of(kept), resonance=True)


def test_a_plan_names_the_scaling():
    assert rope_lines(Settings()) == []
    assert rope_lines(Settings(**YARN, rope_resonance=True)) == [
        "rotary positions: yarn x 4 from 64 tokens, attention x 1.1386, resonance; texts of up to "
        "256 tokens"
    ]
