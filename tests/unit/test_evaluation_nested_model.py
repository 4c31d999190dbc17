"""Exits of one forward pass and sub-models, against transformers' own smaller models."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_sorted.errors import CheckpointError, SettingsError
from megatron_sorted.evaluation.nested_model import load_nested_model
from tests.support.evaluated import VOCAB_SIZE, write_model

CASES = [
    ("llama", {"tied": True}),
    ("llama", {"tied": False}),
    ("mistral", {"tied": False, "sliding_window": 5}),
    ("qwen2", {"tied": True}),
    (
        "qwen2",
        {"tied": False, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    ("qwen3", {"tied": True}),
]


def tokens(seed=1):
    return torch.randint(3, VOCAB_SIZE, (2, 17), generator=torch.Generator().manual_seed(seed))


def truncated(directory, depth):
    """Return the model that transformers itself builds of the first layers."""
    layer_types = json.loads((directory / "config.json").read_text()).get("layer_types")
    more = {"layer_types": layer_types[:depth]} if layer_types else {}
    return AutoModelForCausalLM.from_pretrained(
        directory, num_hidden_layers=depth, dtype=torch.float32, **more
    ).eval()


@pytest.mark.parametrize(("family", "more"), CASES)
@torch.no_grad()
def test_every_exit_is_transformers_own_smaller_model(tmp_path, family, more):
    model = load_nested_model(write_model(tmp_path / "m", family, **more))
    assert model.depths == (1, 2, 3)
    hidden = model.hidden_states(tokens())
    for depth in model.depths:
        expected = truncated(tmp_path / "m", depth)(tokens()).logits
        assert torch.equal(model.logits(depth, hidden[depth]), expected)
        assert torch.equal(model.sub_model(depth)(tokens()).logits, expected)
    assert (model.logits(1, hidden[1]) - model.logits(3, hidden[3])).abs().max() > 0.1


@torch.no_grad()
def test_sub_models_share_all_parameters_and_decode_greedily(tmp_path):
    directory = write_model(tmp_path / "m", tied=True)
    written = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(
        json.dumps(written | {"do_sample": True, "temperature": 5.0})
    )
    model = load_nested_model(directory)
    sub = model.sub_model(2)
    assert {id(p) for p in sub.parameters()} < {id(p) for p in model.model.parameters()}
    ids = tokens()[:1]
    expected = ids
    reference = truncated(directory, 2)
    for _ in range(6):
        expected = torch.cat([expected, reference(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert (
        sub.generate(ids, max_new_tokens=6, eos_token_id=None, pad_token_id=0).tolist()
        == expected.tolist()
    )


def nested(directory, norms=True, heads=True, **config):
    """Return a directory with own norms and heads of exits 1 and 2."""
    write_model(directory, tied=True)
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for depth in (1, 2):
        if norms:
            tensors[f"exits.{depth}.norm.weight"] = torch.rand(32, generator=generator)
        if heads:
            tensors[f"exits.{depth}.lm_head.weight"] = torch.randn(
                VOCAB_SIZE, 32, generator=generator
            )
    save_file(tensors, directory / "exits.safetensors")
    written = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps(
            written
            | {
                "exit_layer_indices": [1, 2, 3],
                "own_exit_norms": norms,
                "tie_exit_lm_head": not heads,
                **config,
            }
        )
    )
    return directory


@pytest.mark.parametrize(("norms", "heads"), [(True, False), (False, True), (True, True)])
@torch.no_grad()
def test_own_norms_and_heads_are_those_of_the_file(tmp_path, norms, heads):
    directory = nested(tmp_path / "m", norms, heads)
    model, own = load_nested_model(directory), load_file(directory / "exits.safetensors")
    hidden = model.hidden_states(tokens())
    for depth in (1, 2, 3):
        reference = truncated(directory, depth)
        if depth < 3 and norms:
            reference.model.norm.weight.copy_(own[f"exits.{depth}.norm.weight"])
        if depth < 3 and heads:
            reference.lm_head.weight = torch.nn.Parameter(own[f"exits.{depth}.lm_head.weight"])
        expected = reference(tokens()).logits
        assert torch.equal(model.logits(depth, hidden[depth]), expected) and torch.equal(
            model.sub_model(depth)(tokens()).logits, expected
        )
        assert model.sub_model(depth).config.tie_word_embeddings == (depth == 3 or not heads)


def test_wrong_exits_are_errors_with_the_tensors_name(tmp_path):
    directory = nested(tmp_path / "m")
    with pytest.raises(SettingsError, match=r"--depths: 4 is not a layer of .* Use 1\.\.3"):
        load_nested_model(directory, [4])
    tensors = load_file(directory / "exits.safetensors")
    save_file(
        {name: t for name, t in tensors.items() if name != "exits.2.norm.weight"},
        directory / "exits.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"exits\.2\.norm\.weight is missing"):
        load_nested_model(directory)
    save_file(
        tensors | {"exits.1.lm_head.weight": torch.zeros(7, 32)}, directory / "exits.safetensors"
    )
    with pytest.raises(
        CheckpointError,
        match=r"exits\.1\.lm_head\.weight has shape \[7, 32\], the model's own has \[300, 32\]",
    ):
        load_nested_model(directory)
    (directory / "exits.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"own heads, but exits\.safetensors is missing"):
        load_nested_model(directory)


def test_a_missing_or_misshapen_tensor_is_never_filled_with_random_numbers(tmp_path):
    directory = write_model(tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    save_file(
        {name: t for name, t in tensors.items() if name != "model.norm.weight"},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=r"1 missing: model\.norm\.weight"):
        load_nested_model(directory)
    save_file(
        tensors | {"model.layers.7.odd": torch.zeros(2)},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=r"1 unknown: model\.layers\.7\.odd"):
        load_nested_model(directory)
    (directory / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_nested_model(directory)
