"""Scaled rotary positions in Hugging Face directories, written, read back and decoded."""

import dataclasses
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sorted.conversion.hugging_face.config_settings import (
    config_of_settings,
    settings_of_config,
)
from megatron_sorted.conversion.hugging_face.families import CONFIG_FILE, read_config
from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.network import load_network
from megatron_sorted.decoding.texts import check_prompts
from megatron_sorted.errors import CheckpointError, DataError
from megatron_sorted.settings.rope_scaling import rope_of
from tests.support.decoding import needs_native
from tests.support.hugging_face import exit_logits, make_model
from tests.support.model_directories import ROPE_LINEAR, ROPE_LLAMA3, tokens

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 12,
}
CASES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": ROPE_LINEAR,
    "llama3": ROPE_LLAMA3,
    "yarn x 4": YARN,
    "yarn x 16": {**YARN, "factor": 16.0, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False},
    "yarn, its own attention": {**YARN, "attention_factor": 1.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}
DEPTHS = (1, 2, 3, 4)
RESONANCE = [name for name in CASES if name != "dynamic"]
WITH_AND_WITHOUT = [(name, False) for name in CASES] + [(name, True) for name in RESONANCE]


def save(directory, name: str, resonance: bool, older_keys: bool = False):
    """Write a directory as an export does; return transformers' model without our config.json."""
    model = make_model("Llama", rope_parameters=dict(CASES[name]), max_position_embeddings=192)
    model.save_pretrained(directory)
    origin = read_config(directory)
    settings = dataclasses.replace(
        settings_of_config(origin, "config.json"), rope_resonance=resonance, exit_layer_nums=DEPTHS
    )
    if older_keys:  # those of transformers 4
        origin = {
            key: value for key, value in origin.items() if key not in ("rope_parameters", "dtype")
        }
    config = config_of_settings(settings, "float32", origin)
    (directory / CONFIG_FILE).write_text(json.dumps(config))
    if resonance:  # as the authors set it
        wavelengths = torch.round(2 * math.pi / model.model.rotary_emb.inv_freq.double())
        model.model.rotary_emb.inv_freq = (2 * math.pi / wavelengths).float()
        model.model.rotary_emb.rope_type = "default"
    return model, settings


def compare(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("older_keys", [False, True], ids=["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(("name", "resonance"), WITH_AND_WITHOUT)
def test_plain_transformers_has_the_logits_of_every_exit(tmp_path, name, resonance, older_keys):
    model, settings = save(tmp_path, name, resonance, older_keys)
    expected = exit_logits(model, tokens(150))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    for depth, logits in exit_logits(plain, tokens(150)).items():
        compare(logits, expected[depth])
    back = settings_of_config(read_config(tmp_path), "config.json")
    assert rope_of(back) == rope_of(settings) and back.rope_resonance == resonance
    is_older = "rope_parameters" not in read_config(tmp_path)
    assert is_older == older_keys and settings.max_position_embeddings == 192


@pytest.mark.parametrize("native", ["off", pytest.param("on", marks=needs_native)])
@pytest.mark.parametrize(("name", "resonance"), WITH_AND_WITHOUT)
def test_the_decoder_has_the_logits_of_every_exit(tmp_path, name, resonance, native):
    model, _ = save(tmp_path, name, resonance)
    text = tokens(150)
    expected = exit_logits(model, text)
    network = load_network(tmp_path, native=native)
    assert network.is_native == (native == "on") and network.depths == DEPTHS
    state = DecodingState(network, 2, 150, DEPTHS)
    for start, end in ((0, 60), (60, 140), (140, 149), (149, 150)):
        state.append(text[:, start:end])
        for depth in DEPTHS:
            state.read(depth)
            got = state.logits(depth, state.last_slots())[:, 0]
            compare(got, expected[depth][:, end - 1])


def test_a_resonance_that_is_left_out_changes_the_logits(tmp_path):
    """Otherwise the comparisons above could not fail."""
    for name in RESONANCE:
        (tmp_path / name).mkdir()
        rounded, _ = save(tmp_path / name, name, True)
        plain = make_model("Llama", rope_parameters=dict(CASES[name]), max_position_embeddings=192)
        difference = exit_logits(rounded, tokens(150))[1] - exit_logits(plain, tokens(150))[1]
        assert difference.abs().max() > 1e-3, name


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 30,
}


@pytest.mark.parametrize(
    ("rope", "longest", "most"),
    [(LONGROPE, 192, 30), ({**LONGROPE, "short_factor": LONGROPE["long_factor"]}, 192, 192)],
)
def test_a_longrope_of_others_is_decoded_while_its_frequencies_are_the_same(
    tmp_path, rope, longest, most
):
    model = make_model("Llama", rope_parameters=rope, max_position_embeddings=longest)
    model.save_pretrained(tmp_path)
    network = load_network(tmp_path, native="off")
    assert network.max_positions == most
    text = tokens(most)
    state = DecodingState(network, 2, most, (4,))
    state.append(text)
    state.read(4)
    compare(state.logits(4, state.last_slots())[:, 0], exit_logits(model, text)[4][:, -1])


@pytest.mark.parametrize(("name", "rope"), [("dynamic", CASES["dynamic"]), ("longrope", LONGROPE)])
def test_texts_whose_cached_keys_would_become_wrong_are_refused(tmp_path, name, rope):
    make_model("Llama", rope_parameters=rope, max_position_embeddings=64).save_pretrained(tmp_path)
    network = load_network(tmp_path, native="off")
    most = network.max_positions
    assert most == (64 if name == "dynamic" else 30)
    check_prompts([[1] * (most - 2)], network, 2)
    with pytest.raises(DataError) as error:
        check_prompts([[1] * most], network, 2)
    assert str(error.value).startswith(
        f"prompt 0: {most} tokens and 2 new ones are more than the model's context of {most}, "
        f"beyond which its rotary positions ({name}) turn all tokens otherwise, so that cached "
        "keys would be wrong. "
    )


def test_transformers_itself_decodes_other_logits_with_a_cache_under_dynamic_scaling():
    """The reason for the refusal: keys in its cache keep the frequencies of a shorter text."""
    rope, text = CASES["dynamic"], tokens(40)
    model = make_model("Llama", rope_parameters=dict(rope), max_position_embeddings=20)
    with torch.no_grad():
        whole = model(text, use_cache=False).logits[:, -1]
        model(text[:, :4], use_cache=False)  # forgets the long text
        first = model(text[:, :39], use_cache=True)
        last = model(text[:, 39:], past_key_values=first.past_key_values).logits[:, -1]
    assert (last - whole).abs().max() > 1e-3


def test_a_changed_resonance_is_refused(tmp_path):
    save(tmp_path, "yarn x 4", True)
    config = read_config(tmp_path)
    for change in (
        {"rope_resonance": {**config["rope_resonance"], "factor": 5.0}},
        {"rope_parameters": {**config["rope_parameters"], "attention_factor": 1.0}},
        {
            "rope_parameters": {
                **config["rope_parameters"],
                "short_factor": config["rope_parameters"]["long_factor"][::-1],
            }
        },
    ):
        with pytest.raises(CheckpointError, match=r"are not those of rope_resonance"):
            settings_of_config({**config, **change}, "config.json")
    with pytest.raises(CheckpointError, match=r"rope_resonance is .* Export the model again"):
        settings_of_config({**config, "rope_resonance": {"factor": []}}, "config.json")


def test_what_no_config_json_expresses_is_refused(tmp_path):
    _, settings = save(tmp_path, "dynamic", False)
    assert settings.rope_scaling_original_max_position_embeddings == 192
    longer = dataclasses.replace(settings, max_position_embeddings=768, seq_length=768)
    # transformers takes it for the context beyond which the base grows
    assert config_of_settings(longer, "float32")["max_position_embeddings"] == 192
    with pytest.raises(CheckpointError, match=r"--rope-resonance: together with .* dynamic"):
        config_of_settings(dataclasses.replace(settings, rope_resonance=True), "float32")
