"""Wider models with the same function: every family, tied and untied, exits with own parts;
against transformers and the reference of exits in plain PyTorch.
"""

import json

import pytest
import torch

from lab.widen import main, widen
from megatron_sorted.conversion.hugging_face.nested_exits import load_nested_exits
from megatron_sorted.errors import CheckpointError, SettingsError
from tests.support.exit_parts import KINDS, save_nested
from tests.support.hugging_face import exit_logits
from tests.support.model_directories import FAMILIES, save_model, tokens

CASES = [
    ("llama", False, 2), ("llama", True, 4), ("llama_linear", True, 3), ("mistral", False, 2),
    ("qwen2", True, 2), ("qwen3", False, 3),
]  # fmt: skip


@pytest.mark.parametrize(("family", "tied", "factor"), CASES)
def test_every_exit_of_a_wider_model_has_the_same_logits(family, tied, factor, tmp_path):
    depths = [1, 3, 4]
    narrow = save_model(tmp_path / "narrow", family, tied, exit_layer_indices=depths)
    expected = exit_logits(narrow, tokens())
    widen(tmp_path / "narrow", tmp_path / "wide", factor)
    wide = load_nested_exits(tmp_path / "wide")
    assert wide.depths == (1, 3, 4)
    for depth in depths:
        assert float((wide(tokens(), depth) - expected[depth]).abs().max()) < 1e-4
    config, other = wide.base.config, narrow.config
    assert config.hidden_size == factor * other.hidden_size
    assert config.num_attention_heads == factor * other.num_attention_heads
    assert config.num_key_value_heads == factor * other.num_key_value_heads
    keys, theirs = (model.model.layers[0].self_attn for model in (wide.base, narrow))
    assert keys.head_dim == theirs.head_dim
    assert set(FAMILIES) == {one for one, _, _ in CASES} | {"llama3"}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_exits_are_widened_too(kind, tied, tmp_path):
    case = save_nested(tmp_path / "narrow", "llama", kind, tied, norms=True, heads=not tied)
    widen(tmp_path / "narrow", tmp_path / "wide", 2)
    wide = load_nested_exits(tmp_path / "wide")
    for depth in (1, 3, 4):
        difference = (wide(tokens(), depth) - case.logits(depth, tokens())).abs().max()
        assert float(difference) < 1e-4
    assert (tmp_path / "wide" / "model.safetensors.index.json").is_file()  # for vLLM


def test_a_tied_model_may_have_exits_with_heads_of_their_own(tmp_path):
    case = save_nested(tmp_path / "narrow", "qwen2", "mlp", True, heads=True)
    widen(tmp_path / "narrow", tmp_path / "wide", 2)
    wide = load_nested_exits(tmp_path / "wide")
    assert float((wide(tokens(), 1) - case.logits(1, tokens())).abs().max()) < 1e-4


def test_what_describes_the_narrow_model_alone_stays_behind(tmp_path, capsys):
    save_model(tmp_path / "narrow", "llama", exit_layer_indices=[2, 4])
    (tmp_path / "narrow" / "decoding.json").write_text("{}")
    (tmp_path / "narrow" / "tokenizer_config.json").write_text('{"model_max_length": 256}')
    main([str(tmp_path / "narrow"), str(tmp_path / "wide"), "--factor", "2"])
    assert "within" in capsys.readouterr().out
    files = {file.name for file in (tmp_path / "wide").iterdir()}
    assert "tokenizer_config.json" in files and "decoding.json" not in files
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["hidden_size"] == 64


def test_a_model_that_would_differ_is_not_written(tmp_path):
    model = save_model(tmp_path / "narrow", "llama", exit_layer_indices=[2, 4])
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)  # rounding alone is then above the bound
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(CheckpointError, match=r"a logit differs by .* more than 0.0001"):
        widen(tmp_path / "large", tmp_path / "wide", 3)
    assert not (tmp_path / "wide").exists()
    with pytest.raises(SettingsError, match="--factor: 1 does not widen"):
        widen(tmp_path / "narrow", tmp_path / "wide", 1)
    (tmp_path / "wide").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        widen(tmp_path / "narrow", tmp_path / "wide", 2)
