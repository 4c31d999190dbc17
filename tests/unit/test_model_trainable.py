"""What trains: everything, or with --tune-exit the intermediate exits' own parts alone.

And where no gradient need leave a chunk.
"""

from types import SimpleNamespace

import pytest
import torch

from megatron_sorted.model.chunk import freeze_others, is_trained
from tests.support.tiny import tiny

OWN = (
    "exit_norms.2.weight",
    "exit_output_layers.2.weight",
    "exit_blocks.2.mlp.linear_fc2.weight",
    "exit_mlps.2.mlp.linear_fc1.weight",
    "exit_adapters.2.up.weight",
)
BASE = (
    "embedding.word_embeddings.weight",
    "decoder.layers.0.mlp.linear_fc2.weight",
    "final_layernorm.weight",
    "output_layer.weight",
)


def test_names():
    assert all(is_trained(name, tiny()) for name in (*OWN, *BASE))
    assert [is_trained(name, tiny(tune_exit=True)) for name in (*OWN, *BASE)] == [True] * 5 + [
        False
    ] * 4


def make_stage(layers_before: int) -> torch.nn.Module:
    stage = torch.nn.Module()
    stage.layout = SimpleNamespace(layers_before=layers_before)
    stage.decoder = torch.nn.Linear(2, 2, bias=False)
    stage.exit_norms = torch.nn.ModuleDict({"2": torch.nn.RMSNorm(2)})
    return stage


@pytest.mark.parametrize("layers_before", [0, 2])
@pytest.mark.parametrize("tune", [False, True])
def test_a_stage_is_frozen_but_for_its_exits(layers_before, tune):
    stage = make_stage(layers_before)
    freeze_others(stage, tiny(tune_exit=tune))
    assert {name: p.requires_grad for name, p in stage.named_parameters()} == {
        "decoder.weight": not tune,
        "exit_norms.2.weight": True,
    }
    assert stage.trains_below is not tune


@pytest.mark.parametrize(("layers_before", "expected"), [(0, False), (2, True)])
def test_layers_train_on_every_stage_so_gradients_leave_all_but_the_first(
    layers_before, expected, monkeypatch
):
    monkeypatch.setattr(
        "megatron_sorted.model.chunk.is_trained", lambda name, settings: name.startswith("decoder")
    )
    stage = make_stage(layers_before)
    freeze_others(stage, tiny())
    assert stage.trains_below is expected
