"""Adapters merged into their matrices, with numbers computed by hand."""

from dataclasses import replace

import pytest
import torch

from megatron_sorted.conversion.tensors import merged_lora
from megatron_sorted.conversion.tensors.merged_lora import AdapterOf, MergedLora, merge_adapters
from megatron_sorted.conversion.tensors.source import TensorInfo, TensorSource
from megatron_sorted.errors import CheckpointError
from megatron_sorted.settings.matrices import layer_shapes
from megatron_sorted.settings.run import Settings

NAME = "decoder.layers.0.self_attention.linear_proj"
SETTINGS = replace(
    Settings(),
    num_layers=1,
    hidden_size=4,
    num_attention_heads=2,
    ffn_hidden_size=6,
    vocab_size=9,
    lora_rank=3,
    lora_alpha=6.0,
    lora_targets=("linear_proj", "linear_fc1"),
)


class Held(TensorSource):
    """Tensors in memory."""

    def __init__(self, held: dict[str, torch.Tensor]):
        self.held = held
        self.tensors = {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in held.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self.held[name].clone()


def by_hand() -> Held:
    return Held(
        {
            f"{NAME}.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
            "other.weight": torch.ones(2),
            f"{NAME}.lora_a": torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
            f"{NAME}.lora_b": torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]]),
        }
    )


@pytest.mark.parametrize("block_bytes", [1, 16, 1 << 20])
@pytest.mark.parametrize(
    ("rank_used", "expected"),
    [
        (2, [[1 + 2 * 1, 2], [3, 4 + 2 * 2], [5 + 2 * 2, 6 + 2 * 6]]),  # alpha / 2 = 2
        (
            1,
            [[1 + 4 * 1, 2], [3, 4], [5 + 4 * 2, 6]],
        ),  # alpha / 1 = 4, the first row of A and column of B
        (0, [[1, 2], [3, 4], [5, 6]]),
    ],
)
def test_the_product_of_the_ranks_used_is_added(rank_used, expected, block_bytes, monkeypatch):
    monkeypatch.setattr(merged_lora, "BLOCK_BYTES", block_bytes)
    source = MergedLora(by_hand(), AdapterOf(("linear_proj",), 4.0, rank_used))
    assert list(source.tensors) == [f"{NAME}.weight", "other.weight"]
    assert torch.equal(source.read(f"{NAME}.weight"), torch.tensor(expected, dtype=torch.float32))
    assert torch.equal(source.read("other.weight"), torch.ones(2))
    assert source.is_adapted(f"{NAME}.weight") == (rank_used > 0) and not source.is_adapted(
        "other.weight"
    )


def test_half_precision_is_rounded_once():
    """Round 1 + 2**-8 + 2**-9 to 1 + 2**-7 in bf16; summing in bf16 would give another number."""
    held = Held(
        {
            f"{NAME}.weight": torch.ones(1, 1, dtype=torch.bfloat16),
            f"{NAME}.lora_a": torch.full((2, 1), 1.0, dtype=torch.bfloat16),
            f"{NAME}.lora_b": torch.tensor([[2.0**-8, 2.0**-9]], dtype=torch.bfloat16),
        }
    )
    merged = MergedLora(held, AdapterOf(("linear_proj",), 2.0, 2)).read(f"{NAME}.weight")
    assert merged.dtype == torch.bfloat16 and merged.item() == 1 + 2.0**-7
    assert (torch.ones(1, dtype=torch.bfloat16) + 2.0**-8 + 2.0**-9).item() == 1


def complete(settings: Settings) -> dict[str, torch.Tensor]:
    held = {}
    for target, where in (("linear_proj", "self_attention"), ("linear_fc1", "mlp")):
        rows, columns = layer_shapes(settings).matrices[target]
        name = f"decoder.layers.0.{where}.{target}"
        held |= {
            f"{name}.weight": torch.zeros(rows, columns),
            f"{name}.lora_a": torch.zeros(settings.lora_rank, columns),
            f"{name}.lora_b": torch.zeros(rows, settings.lora_rank),
        }
    return held


def test_settings_become_those_of_an_ordinary_model():
    source, settings = merge_adapters(
        Held(complete(SETTINGS)), replace(SETTINGS, dylora=True, dylora_frozen=True), None, "here"
    )
    plain = Settings()
    assert settings == replace(
        SETTINGS, lora_rank=0, lora_alpha=plain.lora_alpha, lora_targets=plain.lora_targets
    )
    assert source.adapters == AdapterOf(("linear_proj", "linear_fc1"), 6.0, 3)
    bare = Held({})
    assert merge_adapters(bare, plain, None, "here") == (bare, plain)


@pytest.mark.parametrize(
    ("changes", "rank_used", "message"),
    [
        (
            {},
            2,
            r"--lora-rank-used: 2, but the adapters of here .* at all 3 ranks together \(no "
            r"--dylora\)\. Use one of 0, 3",
        ),
        ({"dylora": True}, 4, r"at the ranks 1, 2, 3\. Use one of 0, 1, 2, 3"),
        ({"dylora": True, "dylora_ranks": (1, 3)}, 2, r"at the ranks 1, 3\. Use one of 0, 1, 3"),
    ],
)
def test_a_rank_that_was_not_trained_is_refused(changes, rank_used, message):
    with pytest.raises(CheckpointError, match=message):
        merge_adapters(Held(complete(SETTINGS)), replace(SETTINGS, **changes), rank_used, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda held: held.pop(f"{NAME}.lora_b"),
            r"linear_proj\.lora_b has shape none, for it is missing, and its settings make it "
            r"\[4, 3\]",
        ),
        (
            lambda held: held.update({f"{NAME}.lora_a": torch.zeros(2, 4)}),
            r"lora_a has shape \[2, 4\], and its settings make it \[3, 4\]",
        ),
        (
            lambda held: held.update({"decoder.layers.0.mlp.linear_fc2.lora_a": torch.zeros(3, 6)}),
            r"linear_fc2\.lora_a .* make it unknown",
        ),
    ],
)
def test_adapters_that_differ_from_the_settings_are_refused(change, message):
    held = complete(SETTINGS)
    change(held)
    with pytest.raises(CheckpointError, match=message):
        merge_adapters(Held(held), SETTINGS, None, "here")
