"""Parameters and operations, against torch's own counter and against the settings' formula."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.evaluation.nested_model import (
    NestedModel,
    count_parameters,
    forward_flops_per_token,
    load_nested_model,
)
from megatron_sorted.settings import costs
from megatron_sorted.settings.load import load_settings
from tests.support.evaluated import VOCAB_SIZE, make_model
from tests.support.exit_parts import KINDS, save_nested

LENGTH = 24


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", False)]
)
def test_costs(family, tied):
    model = NestedModel("m", make_model(family, tied=tied, attn_implementation="eager"), (1, 2, 3))
    settings = load_settings(
        [
            "--num-layers",
            "3",
            "--hidden-size",
            "32",
            "--ffn-hidden-size",
            "48",
            "--num-attention-heads",
            "4",
            "--group-query-attention",
            "--num-query-groups",
            "2",
            "--seq-length",
            str(LENGTH),
            "--exit-layer-nums",
            "1",
            "2",
            *["--untie-embeddings-and-output-weights"] * (not tied),
            *["--add-qkv-bias"] * (family == "qwen2"),
            *["--qk-layernorm"] * (family == "qwen3"),
        ]
    )
    flops, parameters = (
        costs.forward_flops_per_token(settings, VOCAB_SIZE),
        costs.sub_model_parameters(settings, VOCAB_SIZE),
    )
    for depth in model.depths:
        sub = model.sub_model(depth)
        assert (
            forward_flops_per_token(sub, LENGTH) == flops[depth]
            and count_parameters(sub) == parameters[depth]
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            sub(torch.ones(1, LENGTH, dtype=torch.long), use_cache=False)
        # torch multiplies the whole square of attention, of which half is masked
        square = depth * 4 * LENGTH * LENGTH * 32
        assert counter.get_total_flops() - square // 2 == LENGTH * forward_flops_per_token(
            sub, LENGTH
        )


def test_a_window_shorter_than_the_sequence_costs_less():
    model = NestedModel("m", make_model("mistral", sliding_window=6), (3,)).sub_model(3)
    linear = 3 * (32 * (32 + 32) + 32 * 32 + 3 * 32 * 48) + 32 * VOCAB_SIZE
    attended = (
        sum(min(place + 0.5, 6) for place in range(LENGTH)) / LENGTH
    )  # a token's own position counts half, as in L / 2
    assert forward_flops_per_token(model, LENGTH) == 2 * linear + 3 * 4 * 32 * attended
    assert forward_flops_per_token(model, 6) == 2 * linear + 3 * 4 * 32 * 3


@pytest.mark.parametrize("kind", KINDS)
def test_an_exits_own_parts_count(kind, tmp_path):
    save_nested(tmp_path, "qwen2", kind, tied=True)
    model, settings = load_nested_model(tmp_path), open_model(tmp_path).settings
    flops, parameters = (
        costs.forward_flops_per_token(settings, 100, LENGTH),
        costs.sub_model_parameters(settings, 100),
    )
    adapter, block, mlp = KINDS[kind]
    matrices = 6 * 32 * adapter + (2 * 32 * 32 + 2 * 16 * 32) * block + 3 * 32 * 48 * (block or mlp)
    layer = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48) + 2 * LENGTH * 32
    for depth in model.depths:
        sub, part = model.sub_model(depth), (2 * matrices + 2 * LENGTH * 32 * block) * (depth < 4)
        assert (
            forward_flops_per_token(sub, LENGTH)
            == flops[depth]
            == depth * layer + part + 2 * 32 * 100
        )
        assert count_parameters(sub) == parameters[depth]
