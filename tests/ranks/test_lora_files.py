"""Adapters and files: runs that start from models without adapters, and exports."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_sorted.commands import convert
from megatron_sorted.commands import extract as extract_submodel
from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.errors import CheckpointError
from megatron_sorted.settings.lora import is_adapter
from tests.support import hugging_face
from tests.support.gather import join_ranks
from tests.support.given_weights import join_logits
from tests.support.layouts import OWN, PP2, TP2
from tests.support.lora_bodies import merged, train_adapters
from tests.support.model_directories import save_model
from tests.support.rank_bodies import steps_from
from tests.support.ranks import run_ranks
from tests.support.reference import exit_logits
from tests.support.tiny import VOCABULARY, make_samples, tiny

RANK = 6
LORA = {"lora_rank": RANK, "lora_alpha": 9.0}
TOKENS = make_samples(2, 16, 9)["tokens"]
DEPTHS = (1, 2, 3, 4)


def trained(tmp_path, world_size: int, **changes):
    """Return settings, tensors and logits of a run of three steps, saved in ``runs``."""
    (tmp_path / "runs").mkdir()
    settings = tiny(**LORA, **changes)
    reports = run_ranks(world_size, train_adapters, settings, 3, 0, None, str(tmp_path / "runs"))
    weights, _ = join_ranks([report["weights"] for report in reports])
    return settings, weights, join_logits([report["logits"] for report in reports], VOCABULARY)


def plain_logits(weights) -> dict[int, torch.Tensor]:
    return exit_logits(weights, TOKENS, None, DEPTHS, 4, 2, VOCABULARY)


def theirs(directory: Path) -> dict[int, torch.Tensor]:
    """Return transformers' logits of a directory at every depth, with the shared norm and head."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return hugging_face.exit_logits(model, TOKENS)


def assert_close(got, expected, tolerance=2e-5) -> None:
    assert got.keys() == expected.keys()
    for depth in expected:
        assert (got[depth] - expected[depth]).abs().max() < tolerance * expected[
            depth
        ].abs().max(), depth


@pytest.mark.parametrize(
    "world_size, changes",
    [
        (4, {**TP2, **PP2, "sequence_parallel": True}),
        (2, {**PP2, **OWN}),
        (1, {"dylora": True, "lora_targets": ("linear_fc1", "linear_qkv")}),
    ],
)
def test_an_export_has_the_logits_of_the_unmerged_model(world_size, changes, tmp_path):
    settings, weights, logits = trained(tmp_path, world_size, **changes)
    assert_close(logits, plain_logits(merged(weights, settings, RANK)))
    convert.main(
        ["export", f"{tmp_path}/runs", f"{tmp_path}/whole"]
    )  # verified by itself, tensor by tensor and against transformers
    assert_close(
        {4: theirs(tmp_path / "whole")[4]}
        if "use_exit_norm" in changes
        else theirs(tmp_path / "whole"),
        {4: logits[4]} if "use_exit_norm" in changes else logits,
    )
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert "lora" not in json.dumps(config)
    extract_submodel.main([f"{tmp_path}/runs", f"{tmp_path}/sub", "--depth", "2"])
    assert_close({2: theirs(tmp_path / "sub")[2]}, {2: logits[2]})
    convert.main(["export", f"{tmp_path}/runs", f"{tmp_path}/bare", "--lora-rank-used", "0"])
    if "use_exit_norm" not in changes:
        assert_close(
            theirs(tmp_path / "bare"),
            plain_logits(
                {name: tensor for name, tensor in weights.items() if not is_adapter(name)}
            ),
        )
    # a checkpoint of a checkpoint: merged, and an ordinary one
    convert.main(["import", f"{tmp_path}/runs", f"{tmp_path}/again"])
    assert open_model(tmp_path / "again").settings.lora_rank == 0
    convert.main(["verify", f"{tmp_path}/again", f"{tmp_path}/whole"])


def test_nested_ranks_are_cut_to_those_that_were_drawn(tmp_path, capsys):
    settings, weights, _ = trained(tmp_path, 2, **TP2, dylora=True, dylora_ranks=(2, 4, 6))
    for rank in (2, 4):
        convert.main(
            ["export", f"{tmp_path}/runs", f"{tmp_path}/rank{rank}", "--lora-rank-used", str(rank)]
        )
        assert_close(
            theirs(tmp_path / f"rank{rank}"), plain_logits(merged(weights, settings, rank))
        )
        convert.main(
            ["verify", f"{tmp_path}/runs", f"{tmp_path}/rank{rank}", "--lora-rank-used", str(rank)]
        )
    with pytest.raises(
        CheckpointError,
        match=r"--lora-rank-used: 3, but the adapters of .* at the ranks 2, 4, 6\. Use one of 0, "
        r"2, 4, 6",
    ):
        convert.main(["export", f"{tmp_path}/runs", f"{tmp_path}/rank3", "--lora-rank-used", "3"])
    with pytest.raises(CheckpointError, match=r"--lora-rank-used: 2, but .*rank4 has no adapters"):
        convert.main(["verify", f"{tmp_path}/rank4", f"{tmp_path}/rank4", "--lora-rank-used", "2"])


@pytest.mark.parametrize("rank_used", [None, 2])
def test_an_adapter_in_the_format_of_peft_makes_the_same_model_of_its_base(rank_used, tmp_path):
    settings, weights, _ = trained(tmp_path, 2, **PP2, dylora=True)
    used = [] if rank_used is None else ["--lora-rank-used", str(rank_used)]
    convert.main(["export", f"{tmp_path}/runs", f"{tmp_path}/base", "--lora-rank-used", "0"])
    convert.main(["export", f"{tmp_path}/runs", f"{tmp_path}/whole", *used])
    convert.main(
        [
            "export-adapter",
            f"{tmp_path}/runs",
            f"{tmp_path}/adapter",
            "--base-model",
            f"{tmp_path}/base",
            *used,
        ]
    )
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank_used or RANK, 9.0)
    assert config["target_modules"] == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    adapter, base = (
        load_file(tmp_path / "adapter" / "adapter_model.safetensors"),
        load_file(tmp_path / "base" / "model.safetensors"),
    )
    whole, adapted = load_file(tmp_path / "whole" / "model.safetensors"), 0
    for name, tensor in whole.items():
        half = f"base_model.model.{name.removesuffix('weight')}lora_"
        expected = base[name]
        if f"{half}A.weight" in adapter:
            expected = (
                expected
                + 9.0 / config["r"] * adapter[f"{half}B.weight"] @ adapter[f"{half}A.weight"]
            )
            adapted += 1
        assert torch.allclose(tensor, expected, rtol=1e-5, atol=1e-6), name
    assert len(adapter) == 2 * adapted == 2 * 7 * 4
    if find_spec("peft") is None:
        return
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = adapted(TOKENS, use_cache=False).logits
    assert_close({4: logits}, {4: plain_logits(merged(weights, settings, rank_used or RANK))[4]})


def test_an_adapter_without_place_for_what_exits_learned_is_refused(tmp_path):
    trained(tmp_path, 1, **OWN)
    with pytest.raises(
        CheckpointError, match=r"exit_norms\.1\.weight was trained beside the adapters.*Use export"
    ):
        convert.main(
            ["export-adapter", f"{tmp_path}/runs", f"{tmp_path}/adapter", "--base-model", "x"]
        )
    with pytest.raises(CheckpointError, match="has no adapters to write"):
        convert.main(
            [
                "export-adapter",
                f"{tmp_path}/runs",
                f"{tmp_path}/adapter",
                "--base-model",
                "x",
                "--lora-rank-used",
                "0",
            ]
        )


def test_bf16_is_rounded_once_where_adapters_are_merged(tmp_path):
    settings, weights, _ = trained(tmp_path, 1, bf16=True)
    source = open_model(tmp_path / "runs").source
    for name, exact in merged(weights, settings, RANK).items():
        assert source.tensors[name].dtype == torch.bfloat16
        rows = slice(VOCABULARY) if "embedding" in name else slice(None)
        distance = (source.read(name).float() - exact)[rows].abs()
        assert (distance <= 2.0**-8 * exact[rows].abs() + 1e-7).all(), (
            f"{name}: more than half a unit of 8 bits"
        )


STARTS = {
    "a checkpoint": (2, {**TP2, "sequence_parallel": True}),
    "a Hugging Face directory": (2, PP2),
    "a checkpoint, bf16 distributed": (2, {"bf16": True, "use_distributed_optimizer": True}),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_run_starts_from_a_model_without_adapters(name, tmp_path):
    world_size, changes = STARTS[name]
    untied = {"untie_embeddings_and_output_weights": True}
    if "checkpoint" in name:
        reports = run_ranks(2, steps_from, tiny(**PP2, **untied), str(tmp_path), False, 0, 2, True)
        base, _ = join_ranks([report["weights"] for report in reports])
    else:
        base = hugging_face.global_weights(save_model(tmp_path / "model", "qwen3"))
        changes = {
            **changes,
            "qk_layernorm": True,
            "kv_channels": 16,
            "rotary_base": 10000,
            "norm_epsilon": 1e-6,
            "max_position_embeddings": 256,
        }
        tmp_path = tmp_path / "model"
    settings = tiny(**LORA, **untied, **changes, finetune="checkpoint" in name, lr=1e-3)
    reports = run_ranks(world_size, train_adapters, settings, 2, 0, str(tmp_path))
    (held, _), (later, _) = (
        join_ranks([report[key] for report in reports]) for key in ("initial", "weights")
    )
    fresh, _ = join_ranks(
        [report["made"] for report in run_ranks(world_size, train_adapters, settings, 0)]
    )
    for key in held:
        rows = slice(VOCABULARY) if "embedding" in key or "output_layer" in key else slice(None)
        if is_adapter(key):
            assert torch.equal(held[key], fresh[key]) and not torch.equal(later[key], held[key]), (
                key
            )
        else:
            expected = base[key].bfloat16().float() if settings.bf16 else base[key]
            assert torch.equal(held[key][rows], expected[rows]) and torch.equal(
                later[key], held[key]
            ), key
    assert held.keys() == fresh.keys() and base.keys() == {
        key for key in held if not is_adapter(key)
    }


def test_other_adapters_than_those_of_the_checkpoint_are_refused(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "runs").mkdir()
    run_ranks(1, steps_from, tiny(), str(tmp_path / "base"), False, 0, 1, True)
    run_ranks(1, train_adapters, tiny(**LORA), 1, 0, None, str(tmp_path / "runs"))
    cases = [
        (
            "base",
            LORA,
            r"--lora-rank: 0 in the checkpoint, 6 in this run\. Its optimizer has no "
            r"state.*--pretrained-checkpoint",
        ),
        ("runs", {}, r"--lora-rank: 6 in the checkpoint, 0 in this run.*merge its adapters"),
        ("runs", {**LORA, "lora_rank": 8}, r"--lora-rank: 6 in the checkpoint, 8 in this run"),
        (
            "runs",
            {**LORA, "lora_alpha": 1.0, "finetune": True},
            r"--lora-alpha: 9\.0 in the checkpoint, 1\.0 in this run",
        ),
        (
            "runs",
            {**LORA, "lora_targets": ("linear_qkv",)},
            r"--lora-targets: linear_qkv,linear_proj,linear_fc1,linear_fc2 in the",
        ),
    ]
    for root, changes, line in cases:
        with pytest.raises(AssertionError, match=line):
            run_ranks(1, train_adapters, tiny(**changes), 2, 1, str(tmp_path / root))
