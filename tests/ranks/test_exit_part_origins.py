"""Initial values of exits' own parts: copies of the last such part of the initial model."""

import dataclasses

import pytest
import torch

from megatron_sorted.errors import CheckpointError
from megatron_sorted.training.run.inputs import find_checkpoints
from tests.support.frozen_bodies import begin_from
from tests.support.gather import join_ranks
from tests.support.hugging_face import global_weights
from tests.support.layouts import PP2
from tests.support.model_directories import save_model
from tests.support.rank_bodies import steps_from
from tests.support.ranks import run_ranks
from tests.support.tiny import VOCABULARY, tiny

TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
BLOCK = {
    "use_exit_block": True,
    "exit_adapter_rank": 3,
    "use_exit_norm": True,
    "untie_exit_output_weights": True,
}
MLP = {"use_exit_mlp": True}


def expected_parts(weights: dict[str, torch.Tensor], parts: dict) -> dict[str, torch.Tensor]:
    """Return the initial values of the parts of exits 1, 2 and 3 that are copies."""
    expected, last = {}, "decoder.layers.3."
    head = weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"])
    for depth in (1, 2, 3):
        if "use_exit_block" in parts:
            expected |= {
                name.replace(last, f"exit_blocks.{depth}."): w
                for name, w in weights.items()
                if name.startswith(last)
            }
            expected |= {
                f"exit_norms.{depth}.weight": weights["decoder.final_layernorm.weight"],
                f"exit_output_layers.{depth}.weight": head,
            }
        else:
            expected |= {
                name.replace(f"{last}mlp.", f"exit_mlps.{depth}."): w
                for name, w in weights.items()
                if name.startswith(f"{last}mlp.")
            }
    return expected


def compare(world_size: int, settings, weights: dict[str, torch.Tensor], parts: dict) -> list[str]:
    """Start the run; check its weights, copied parts and zero adapters; return the ranks' logs."""
    reports = run_ranks(world_size, begin_from, settings)
    held, _ = join_ranks([shards for shards, _ in reports])
    expected = weights | expected_parts(weights, parts)
    adapters = {name for name in held if name.startswith("exit_adapters")}
    assert held.keys() == expected.keys() | adapters
    for name, weight in expected.items():
        rows = slice(VOCABULARY) if "embedding" in name or "output_layer" in name else slice(None)
        assert torch.equal(
            held[name][rows],
            weight[rows].to(torch.bfloat16).float() if settings.bf16 else weight[rows],
        ), name
    assert len(adapters) == (6 if "exit_adapter_rank" in parts else 0)
    assert all(held[name].any() == name.endswith("down.weight") for name in adapters)
    return reports[0][1]


CASES = {
    "block tp2 pp2": ("llama", (4, {**TP2_PP2, **BLOCK, "tune_exit": True})),
    "mlp pp2 bf16": ("mistral", (2, {**PP2, **MLP, "bf16": True})),
    "block, query biases, distributed overlap": (
        "qwen2",
        (
            2,
            {
                **BLOCK,
                "use_distributed_optimizer": True,
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
            },
        ),
    ),
    "block, query norms": ("qwen3", (1, BLOCK)),
}
NETWORKS = {
    "llama": {"group_query_attention": False, "num_query_groups": None, "norm_epsilon": 1e-6},
    "mistral": {"sliding_window": 20, "norm_epsilon": 1e-6},
    "qwen2": {"add_qkv_bias": True, "norm_epsilon": 1e-6},
    "qwen3": {"qk_layernorm": True, "kv_channels": 16, "norm_epsilon": 1e-6},
}


@pytest.mark.parametrize("name", CASES)
def test_parts_begin_as_copies_of_the_last_layer_of_a_hugging_face_model(name, tmp_path):
    family, (world_size, changes) = CASES[name]
    model = save_model(tmp_path / "theirs", family)
    settings = tiny(
        load=str(tmp_path / "theirs"),
        max_position_embeddings=256,
        untie_embeddings_and_output_weights=True,
        **{**NETWORKS[family], **changes},
    )
    compare(world_size, settings, global_weights(model), changes)


@pytest.mark.parametrize(
    ("world_size", "parts"), [(1, BLOCK), (2, {**PP2, **MLP, "tune_exit": True})]
)
def test_parts_begin_as_copies_where_a_run_takes_the_weights_of_a_checkpoint_without_them(
    world_size, parts, tmp_path
):
    saved = run_ranks(1, steps_from, tiny(), str(tmp_path), False, 0, 2, True)
    weights, _ = join_ranks([saved[0]["weights"]])
    settings = tiny(load=str(tmp_path), finetune=True, **parts)
    (line,) = compare(world_size, settings, weights, parts)
    assert line.endswith("weights only, starting at step 0")
    with pytest.raises(
        CheckpointError,
        match=r"made with other sizes. .*--use-exit-(block|mlp): False in the checkpoint, True",
    ):
        find_checkpoints(dataclasses.replace(settings, finetune=False), None, None)


def test_parts_that_a_checkpoint_has_are_neither_removed_nor_moved(tmp_path):
    run_ranks(1, steps_from, tiny(use_exit_mlp=True), str(tmp_path), False, 0, 1, True)
    for changes, message in (
        ({}, "--use-exit-mlp: True in the checkpoint, False in this run"),
        ({"use_exit_mlp": True, "exit_layer_nums": (1, 2)}, "--exit-layer-nums"),
        (
            {"use_exit_mlp": True, "exit_adapter_rank": 2, "exit_layer_nums": (1, 2)},
            "--exit-layer-nums",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            find_checkpoints(tiny(load=str(tmp_path), finetune=True, **changes), None, None)


def test_a_run_does_not_resume_with_other_trained_parameters(tmp_path):
    run_ranks(1, steps_from, tiny(use_exit_norm=True), str(tmp_path), False, 0, 1, True)
    with pytest.raises(
        CheckpointError, match=r"--tune-exit: False in .*, True in this run; the optimizer's state"
    ):
        find_checkpoints(tiny(use_exit_norm=True, tune_exit=True, load=str(tmp_path)), None, None)
    find_checkpoints(
        tiny(use_exit_norm=True, tune_exit=True, load=str(tmp_path), finetune=True), None, None
    )
