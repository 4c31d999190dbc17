"""Averaged weights equal the mean of the steps: in every layout, resumed, and in another layout."""

import dataclasses

import pytest
import torch

from megatron_sorted.model.config import can_route_without_transformer_engine
from tests.support.average_bodies import averaged_steps
from tests.support.gather import join_ranks
from tests.support.layouts import (
    CHUNKS,
    DISTRIBUTED,
    FSDP,
    OVERLAP,
    OWN,
    PP2,
    SP,
    TP2,
    UNTIED,
    all_but,
)
from tests.support.ranks import run_ranks
from tests.support.reference import running_mean
from tests.support.same_state import assert_equal
from tests.support.tiny import VOCABULARY, tiny

# steps 3, 5 and 7 of 7 are averaged
STEPS = {"train_iters": 7, "average_weights_from": 1 / 7, "average_every": 2}
AVERAGED = (3, 5, 7)
EMA = {"average_weights_decay": 0.7}
BF16 = {"bf16": True}
FROZEN = {"tune_exit": True, "exit_layer_nums": (2,), "use_exit_block": True, **OWN}
EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 24}
EP2 = {"expert_model_parallel_size": 2}
# hidden 36: buckets of the distributed optimizer need padding
ODD = {"hidden_size": 36, "num_attention_heads": 6, "num_query_groups": 2, "kv_channels": 6}
LAYOUTS = {
    "one process": (1, {}),
    "tp2 sequence parallel own": (2, {**TP2, **SP, **OWN}),
    "pp2 chunks2 tied": (2, {**PP2, **CHUNKS}),
    "pp2 untied exponential": (2, {**PP2, **UNTIED, **EMA}),
    "dp2 distributed overlap": (2, {**ODD, **OVERLAP}),
    "bf16 dp2 distributed": (2, {**ODD, **BF16, **DISTRIBUTED}),
    "bf16 tp2": (2, {**TP2, **BF16}),
    "fsdp": (2, {**ODD, **FSDP}),
    "fsdp bf16 exponential": (2, {**FSDP, **BF16, **EMA}),
    "frozen base": (2, {**PP2, **FROZEN}),
    "adapters of exits": (1, {"exit_adapter_rank": 4}),
    "sgd": (1, {"optimizer": "sgd", "lr": 0.1}),
    "tp2 pp2 distributed": (4, {**TP2, **PP2, **DISTRIBUTED}),
}
HAS_EXPERTS = can_route_without_transformer_engine()
if HAS_EXPERTS:  # as in tests/ranks/test_experts.py
    LAYOUTS["experts ep2 distributed"] = (2, {**EXPERTS, **EP2, **DISTRIBUTED})
LONG = ("fsdp bf16 exponential", "bf16 tp2", "tp2 pp2 distributed", "sgd")


def joined(reports: list[dict], key: str) -> dict[str, torch.Tensor]:
    """Return whole tensors of a report's entry, without padded rows, from all ranks."""
    return real_rows(join_ranks([report[key] for report in reports])[0])


def real_rows(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors without padded rows of the vocabulary."""
    return {
        name: tensor[:VOCABULARY] if "embedding" in name or "output_layer" in name else tensor
        for name, tensor in weights.items()
    }


def expected_average(reports: list[list[dict]], settings) -> dict[str, torch.Tensor]:
    """Return the reference's average of the weights after the steps that are averaged.

    ``reports`` are the ranks' reports of one run, or of a run and those that resumed it.
    """
    weights = {
        step: real_rows(join_ranks([rank["steps"][step] for rank in part])[0])
        for part in reports
        for step in part[0]["steps"]
    }
    return running_mean([weights[step] for step in AVERAGED], settings.average_weights_decay)


def assert_near(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Check that every tensor differs by 1e-6 of the norm of the expected one at most."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = ((got[name].double() - tensor).norm() / tensor.norm().clamp(min=1e-12)).item()
        assert difference < 1e-6, f"{name}: {difference}"


@pytest.mark.parametrize(
    "name", all_but(LAYOUTS, "each of its settings stands in another row", *LONG)
)
def test_average_is_the_mean_of_the_steps(name, tmp_path):
    world_size, changes = LAYOUTS[name]
    check_average(world_size, changes, str(tmp_path))


def check_average(world_size: int, changes: dict, root: str) -> None:
    """Check the average of a whole run, what layers read while it is in place, and afterwards."""
    settings = tiny(**STEPS, **changes)
    reports = run_ranks(world_size, averaged_steps, settings, root, False, 0, 7, False)
    expected = expected_average([reports], settings)
    assert_near(joined(reports, "averaged"), expected)
    last = real_rows(join_ranks([report["steps"][7] for report in reports])[0])
    assert any(not torch.equal(last[tensor], mean.float()) for tensor, mean in expected.items())
    # what layers read is the average in their precision, and then the last weights again
    dtype = torch.bfloat16 if settings.bf16 and settings.data_parallel != "fsdp" else torch.float32
    averaged = {n: w.to(dtype).float() for n, w in joined(reports, "averaged").items()}
    assert_equal(joined(reports, "in_layers"), averaged, "weights of layers, averaged")
    assert_equal(joined(reports, "back"), last, "weights afterwards")
    rounded = {n: w.to(dtype).float() for n, w in last.items()}
    assert_equal(joined(reports, "back_in_layers"), rounded, "weights of layers afterwards")
    _, copies = join_ranks([report["averaged"] for report in reports])
    for tensor, held in copies.items():
        assert all(torch.equal(held[0], other) for other in held[1:]), f"copies of {tensor} differ"


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [(1, {}), (2, {**ODD, **DISTRIBUTED, **BF16}), (2, {**ODD, **FSDP, **EMA})],
)
def test_a_resumed_average_equals_the_uninterrupted_one_bit_for_bit(world_size, changes, tmp_path):
    settings, root = tiny(**STEPS, **changes), str(tmp_path)
    saving = dataclasses.replace(settings, save=root)
    whole = run_ranks(world_size, averaged_steps, settings, root, False, 0, 7, False)
    half = run_ranks(world_size, averaged_steps, saving, root, False, 0, 4, True)
    loading = dataclasses.replace(settings, load=root)
    rest = run_ranks(world_size, averaged_steps, loading, root, True, 4, 7, False)
    assert_equal(joined(rest, "loaded"), joined(half, "averaged"), "loaded average")
    assert_equal(joined(rest, "averaged"), joined(whole, "averaged"), "average")


OTHER_LAYOUT = {
    "dp2 distributed -> one process": ((2, DISTRIBUTED), (1, DISTRIBUTED)),
    "fsdp -> tp2 distributed": ((2, FSDP), (2, {**TP2, **DISTRIBUTED})),
    "tp2 -> pp2 chunks2": ((2, TP2), (2, {**PP2, **CHUNKS})),
    "bf16 dp2 distributed -> bf16 fsdp": ((2, {**BF16, **DISTRIBUTED}), (2, {**BF16, **FSDP})),
    "tp2 pp2 distributed -> pp2 dp2 chunks2": (
        (4, {**TP2, **PP2, **DISTRIBUTED}),
        (4, {**PP2, **CHUNKS, **DISTRIBUTED}),
    ),
}
if HAS_EXPERTS:
    OTHER_LAYOUT["experts ep2 distributed -> experts, one process"] = (
        (2, {**EXPERTS, **DISTRIBUTED, **EP2}),
        (1, {**EXPERTS, **DISTRIBUTED}),
    )


@pytest.mark.parametrize(
    "name",
    all_but(
        OTHER_LAYOUT,
        "each layout of its two is left or entered in another row",
        "tp2 pp2 distributed -> pp2 dp2 chunks2",
    ),
)
def test_an_average_goes_on_in_another_layout(name, tmp_path):
    (world_before, before), (world_after, after) = OTHER_LAYOUT[name]
    root = str(tmp_path)
    first = tiny(**STEPS, **{**ODD, **before}, save=root)
    second = tiny(**STEPS, **{**ODD, **after}, load=root)
    saved = run_ranks(world_before, averaged_steps, first, root, False, 0, 5, True)
    loaded = run_ranks(world_after, averaged_steps, second, root, True, 5, 7, False)
    assert_equal(joined(loaded, "loaded"), joined(saved, "averaged"), "loaded average")
    assert_near(joined(loaded, "averaged"), expected_average([saved, loaded], second))


def test_an_average_takes_one_fp32_copy_of_the_shard(tmp_path):
    weights = 4 * sum(
        tensor.numel()
        for tensor in joined(
            run_ranks(1, averaged_steps, tiny(**STEPS), str(tmp_path), False, 0, 0, False), "back"
        ).values()
    )
    for changes in (DISTRIBUTED, FSDP):
        reports = run_ranks(
            2, averaged_steps, tiny(**STEPS, **changes), str(tmp_path), False, 0, 0, False
        )
        held = [report["bytes"] for report in reports]
        # rows and buckets are padded to equal parts
        assert sum(held) == weights or abs(sum(held) / weights - 1) < 0.01, held
        assert max(held) < 0.6 * weights
