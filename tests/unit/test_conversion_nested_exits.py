"""The module beside exported models: stands alone, names what is wrong, decodes greedily."""

import ast
from pathlib import Path

import pytest
import torch

from megatron_sorted.conversion.hugging_face import nested_exits
from tests.support.exit_parts import change_config, save_nested
from tests.support.model_directories import tokens


def test_the_module_stands_alone_and_names_its_project():
    source = Path(nested_exits.__file__).read_text()
    imported = {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {
        node.module.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
    }
    assert imported == {
        "collections",
        "copy",
        "dataclasses",
        "json",
        "pathlib",
        "safetensors",
        "torch",
        "transformers",
    }
    assert (
        "Apache-2.0" in nested_exits.__doc__
        and "from nested_exits import load_nested_exits" in nested_exits.__doc__
    )


def test_exits_compute_expected_logits_and_share_parameters(tmp_path):
    case = save_nested(tmp_path, "llama", "adapter and block", norms=True)
    model = nested_exits.load_nested_exits(tmp_path)
    assert model.depths == (1, 3, 4)
    for depth in (None, 1, 3, 4):
        expected, logits_of = case.logits(depth or 4, tokens()), model(tokens(), depth=depth)
        assert float((logits_of - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert (
        model.model_at(1).lm_head is model.base.lm_head
        and model.model_at(3).model.norm is not model.base.model.norm
    )
    number = sum(parameter.numel() for parameter in model.parameters())
    assert number == sum(
        tensor.numel() for tensor in (*case.model.parameters(), *case.their_tensors().values())
    )
    with pytest.raises(ValueError, match="depth 2 is no exit of this model; its exits are 1, 3, 4"):
        model(tokens(), depth=2)
    half = model.to(torch.bfloat16)
    assert half(tokens(), depth=1).dtype == torch.bfloat16


def test_a_left_padded_prompt_continues_as_without_padding(tmp_path):
    save_nested(tmp_path, "mistral", "block")
    model = nested_exits.load_nested_exits(tmp_path)
    prompt, more = tokens()[:1, :9], {"max_new_tokens": 8, "pad_token_id": 0}
    alone = model.generate(prompt, depth=1, **more)
    filled = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], 1)
    mask = torch.tensor([[0] * 3 + [1] * 9])
    assert torch.equal(model.generate(filled, depth=1, attention_mask=mask, **more)[:, 3:], alone)


def test_errors_name_the_tensor(tmp_path):
    save_nested(tmp_path, "llama", "mlp", norms=True)
    change_config(tmp_path, exit_adapter_rank=2)
    with pytest.raises(
        ValueError, match=r"exits\.safetensors: exits\.1\.adapter\.down\.weight is missing"
    ):
        nested_exits.load_nested_exits(tmp_path)
    change_config(tmp_path, exit_adapter_rank=None, exit_mlp=None)
    with pytest.raises(
        ValueError,
        match=r"exits\.1\.mlp\.down_proj\.weight, .*config\.json declares no such tensor",
    ):
        nested_exits.load_nested_exits(tmp_path)
