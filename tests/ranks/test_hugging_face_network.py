"""Every exit has the logits of transformers' model of its depth and weights, in every layout."""

import math

import pytest
import torch

from tests.support.gather import join_ranks
from tests.support.given_weights import gradients_of_step, join_logits, logits_of_exits
from tests.support.hugging_face import exit_logits, global_weights, gradients, make_model
from tests.support.layouts import UNTIED, thinned
from tests.support.ranks import run_ranks
from tests.support.tiny import VOCABULARY, make_samples, tiny

LENGTH = 48
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ROPE_SCALING = {
    "use_rope_scaling": True,
    "rope_scaling_factor": 8.0,
    "rope_scaling_original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARN_SCALING = {
    "rope_scaling_type": "yarn",
    "rope_scaling_factor": 4.0,
    "rope_scaling_original_max_position_embeddings": 16,
}
# name: (family, changes of its config, changes of our settings); tiny: 4 layers, 4 heads in 2
# groups, tied
CASES = {
    "llama 1, all heads, untied": (
        "Llama",
        {"num_key_value_heads": 4, "tie_word_embeddings": False, "rms_norm_eps": 1e-6},
        {"group_query_attention": False, "num_query_groups": None, "norm_epsilon": 1e-6, **UNTIED},
    ),
    "llama 3.2, tied, scaled": (
        "Llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "rms_norm_eps": 1e-5},
        ROPE_SCALING,
    ),
    "llama, other numbers of the scaling, base 500000": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
            "head_dim": 16,
            "rope_parameters": {
                **LLAMA3,
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 0.5,
                "high_freq_factor": 2.5,
                "original_max_position_embeddings": 24,
            },
        },
        {
            "kv_channels": 16,
            "rotary_base": 500000,
            "use_rope_scaling": True,
            "rope_scaling_factor": 32.0,
            "rope_scaling_low_freq_factor": 0.5,
            "rope_scaling_high_freq_factor": 2.5,
            "rope_scaling_original_max_position_embeddings": 24,
        },
    ),
    "llama 2, positions interpolated": (
        "Llama",
        {
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0},
        },
        {"rotary_seq_len_interpolation_factor": 2.5, **UNTIED},
    ),
    "yarn, factor 4": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 10000.0, **YARN},
        },
        YARN_SCALING,
    ),
    "yarn, factor 16, all parameters": (
        "Qwen2",
        {
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                **YARN,
                "rope_theta": 1000000.0,
                "factor": 16.0,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "truncate": False,
                "mscale": 0.7,
                "mscale_all_dim": 0.3,
            },
        },
        {
            **YARN_SCALING,
            "add_qkv_bias": True,
            "norm_epsilon": 1e-6,
            "rotary_base": 1000000,
            "rope_scaling_factor": 16.0,
            "rope_scaling_beta_fast": 4.0,
            "rope_scaling_beta_slow": 0.5,
            "rope_scaling_truncate": False,
            "rope_scaling_mscale": 0.7,
            "rope_scaling_mscale_all_dim": 0.3,
            **UNTIED,
        },
    ),
    "dynamic, longer than its context": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        },
        {
            "rope_scaling_type": "dynamic",
            "rope_scaling_factor": 4.0,
            "rope_scaling_original_max_position_embeddings": 16,
        },
    ),
    "mistral 0.1, sliding window": (
        "Mistral",
        {"tie_word_embeddings": False, "sliding_window": 7, "rms_norm_eps": 1e-5},
        {"sliding_window": 7, **UNTIED},
    ),
    "mistral 0.3, no window": (
        "Mistral",
        {
            "tie_word_embeddings": False,
            "sliding_window": None,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        {"rotary_base": 1000000, **UNTIED},
    ),
    "qwen 2, biases, tied": (
        "Qwen2",
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-6},
        {"add_qkv_bias": True, "norm_epsilon": 1e-6},
    ),
    "qwen 2.5, biases, untied": (
        "Qwen2",
        {"tie_word_embeddings": False, "rms_norm_eps": 1e-6},
        {"add_qkv_bias": True, "norm_epsilon": 1e-6, **UNTIED},
    ),
    "qwen 3, norms, wide heads, tied": (
        "Qwen3",
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-6, "head_dim": 16},
        {"qk_layernorm": True, "kv_channels": 16, "norm_epsilon": 1e-6},
    ),
    "qwen 3, norms, untied": (
        "Qwen3",
        {"tie_word_embeddings": False, "rms_norm_eps": 1e-3, "head_dim": 8},
        {"qk_layernorm": True, "norm_epsilon": 1e-3, **UNTIED},
    ),
}
LAYOUTS = {
    "one process": (1, {}),
    "tp2 pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
SEQUENCE_PARALLEL = (4, {**LAYOUTS["tp2 pp2"][1], "sequence_parallel": True})


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def compare(name: str, layout: tuple[int, dict], changes: dict | None = None) -> None:
    family, config, ours = CASES[name]
    world_size, split = layout
    model = make_model(family, **config)
    weights = global_weights(model)
    settings = tiny(seq_length=LENGTH, **{**ours, **split, **(changes or {})})
    reports = run_ranks(world_size, logits_of_exits, settings, weights, tokens())
    assert set.union(*(used for _, used, _ in reports)) == weights.keys(), (
        "a weight of transformers' model was left over"
    )
    got, expected = join_logits(reports, VOCABULARY), exit_logits(model, tokens())
    assert got.keys() == expected.keys() == {1, 2, 3, 4}
    for depth in expected:
        difference = (got[depth] - expected[depth]).abs().max().item()
        assert difference < 1e-5, (
            f"exit {depth}: logits up to {expected[depth].abs().max():.2f} differ by "
            f"{difference:.2e}"
        )


@pytest.mark.parametrize("layout", thinned(LAYOUTS, "tp2 pp2"))
@pytest.mark.parametrize("name", CASES)
def test_logits_of_every_exit_equal_those_of_transformers(name, layout):
    compare(name, LAYOUTS[layout])


def test_logits_with_sequence_parallelism_and_recomputed_layers():
    compare("qwen 3, norms, wide heads, tied", SEQUENCE_PARALLEL)
    compare("mistral 0.1, sliding window", SEQUENCE_PARALLEL, {"recompute_granularity": "full"})


def test_the_logits_depend_on_every_difference_between_the_cases():
    """Without one of its settings each case has other logits, so the comparisons above can fail."""
    forgotten = {
        "llama 3.2, tied, scaled": {"use_rope_scaling": False},
        "llama, other numbers of the scaling, base 500000": {"rope_scaling_low_freq_factor": 1.0},
        "llama 2, positions interpolated": {"rotary_seq_len_interpolation_factor": None},
        "yarn, factor 4": {"rope_scaling_factor": 5.0},
        "yarn, factor 16, all parameters": {"rope_scaling_mscale": None},
        "dynamic, longer than its context": {"rope_scaling_factor": 3.0},
        "mistral 0.1, sliding window": {"sliding_window": 8},
        "qwen 3, norms, untied": {"norm_epsilon": 1e-6},
    }
    for name, changes in forgotten.items():
        with pytest.raises(AssertionError, match=r"exit \d: logits"):
            compare(name, LAYOUTS["one process"], changes)


def test_packed_documents_see_only_themselves_within_the_window():
    model = make_model("Mistral", **CASES["mistral 0.1, sliding window"][1])
    settings = tiny(seq_length=LENGTH, sliding_window=7, **UNTIED)
    starts = [[0, 5, 30], [0, 20, 21]]  # documents shorter and longer than the window
    segments = torch.zeros(2, LENGTH, dtype=torch.int32)
    for row, begins in enumerate(starts):
        for begin in begins[1:]:
            segments[row, begin:] += 1
    got = join_logits(
        run_ranks(1, logits_of_exits, settings, global_weights(model), tokens(), segments),
        VOCABULARY,
    )
    for row, begins in enumerate(starts):
        for begin, end in zip(begins, [*begins[1:], LENGTH], strict=True):
            alone = exit_logits(model, tokens()[row : row + 1, begin:end])
            for depth, logits in alone.items():
                assert (got[depth][row, begin:end] - logits[0]).abs().max() < 1e-5, (
                    row,
                    begin,
                    depth,
                )


COEFFICIENTS = {1: 0.5, 2: 1.0, 3: 0.25, 4: 1.0}


@pytest.mark.parametrize(
    "name",
    [
        "llama 3.2, tied, scaled",
        "mistral 0.1, sliding window",
        "qwen 2.5, biases, untied",
        "qwen 3, norms, wide heads, tied",
    ],
)
def test_gradients_of_all_exits_equal_those_of_transformers(name):
    """Norms of queries and keys see only their rank's heads, and biases only theirs."""
    family, config, ours = CASES[name]
    model = make_model(family, **config)
    weights, samples = global_weights(model), make_samples(8, LENGTH, 5)
    expected = gradients(model, samples["tokens"], samples["labels"], COEFFICIENTS)
    for world_size, split in (*LAYOUTS.values(), SEQUENCE_PARALLEL):
        settings = tiny(seq_length=LENGTH, clip_grad=0.0, **{**ours, **split})
        got, _ = join_ranks(
            run_ranks(world_size, gradients_of_step, settings, weights, COEFFICIENTS)
        )
        assert got.keys() == expected.keys()
        for key, gradient in expected.items():
            computed = (
                got[key][:VOCABULARY] if "embedding" in key or "output_layer" in key else got[key]
            )
            assert (computed - gradient).norm() < 1e-5 * gradient.norm(), f"{key} in {split}"


def with_resonance(model):
    """Return the model with whole wavelengths, as the authors of Resonance RoPE set them."""
    rotary = model.model.rotary_emb
    wavelengths = torch.round(2 * math.pi / rotary.inv_freq.double())
    rotary.inv_freq = (2 * math.pi / wavelengths).float()
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["yarn, factor 4", "yarn, factor 16, all parameters", "llama 3.2, tied, scaled"]
)
def test_resonance_on_top_of_a_scaling(name, layout):
    family, config, ours = CASES[name]
    world_size, split = LAYOUTS[layout]
    plain, model = make_model(family, **config), with_resonance(make_model(family, **config))
    settings = tiny(seq_length=LENGTH, rope_resonance=True, **{**ours, **split})
    reports = run_ranks(world_size, logits_of_exits, settings, global_weights(model), tokens())
    got = join_logits(reports, VOCABULARY)
    expected, unrounded = exit_logits(model, tokens()), exit_logits(plain, tokens())
    for depth, logits in expected.items():
        assert (got[depth] - logits).abs().max() < 1e-5 * logits.abs().max()
        assert (got[depth] - unrounded[depth]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["yarn, factor 4", "llama 2, positions interpolated"])
def test_packed_documents_with_scaled_rotary_positions(name):
    """A document within a sample has the logits of the document alone."""
    family, config, ours = CASES[name]
    model = with_resonance(make_model(family, **config))
    settings = tiny(seq_length=LENGTH, rope_resonance=True, **ours)
    segments = torch.zeros(2, LENGTH, dtype=torch.int32)
    segments[0, 11:], segments[1, 40:] = 1, 1
    reports = run_ranks(1, logits_of_exits, settings, global_weights(model), tokens(), segments)
    got = join_logits(reports, VOCABULARY)
    for row, begin in ((0, 11), (1, 40)):
        for start, end in ((0, begin), (begin, LENGTH)):
            alone = exit_logits(model, tokens()[row : row + 1, start:end])
            for depth, logits in alone.items():
                difference = (got[depth][row, start:end] - logits[0]).abs().max()
                assert difference < 1e-5 * logits.abs().max()


def test_documents_packed_under_dynamic_scaling_have_the_frequencies_of_the_whole_sample():
    name = "dynamic, longer than its context"
    family, config, ours = CASES[name]
    model, begin = make_model(family, **config), 30
    segments = torch.zeros(2, LENGTH, dtype=torch.int32)
    segments[:, begin:] = 1
    settings = tiny(seq_length=LENGTH, **ours)
    reports = run_ranks(1, logits_of_exits, settings, global_weights(model), tokens(), segments)
    got = join_logits(reports, VOCABULARY)
    # transformers, given positions that begin anew, would take the longest document's length
    model(tokens(), use_cache=False)  # it keeps the frequencies of the longest text so far
    whole = exit_logits(model, tokens()[:, begin:])
    for depth, logits in whole.items():
        assert (got[depth][:, begin:] - logits).abs().max() < 1e-5
    alone = exit_logits(make_model(family, **config), tokens()[:, begin:])
    assert (got[4][:, begin:] - alone[4]).abs().max() > 1e-3
