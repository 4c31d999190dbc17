"""Adapters in every layout equal plain PyTorch with merged matrices; the network never changes."""

import pytest
import torch

from megatron_sorted.settings.lora import adapter_parameters, is_adapter, rank_at
from tests.ranks.test_layouts import relative
from tests.support.gather import join_ranks
from tests.support.layouts import CHUNKS, OVERLAP, OWN, PP2, SP, TP2, UNTIED, thinned
from tests.support.lora_bodies import TRAINED_EXIT_PARTS, reference_adapters, train_adapters
from tests.support.ranks import run_ranks
from tests.support.tiny import VOCABULARY, tiny

STEPS, RANK = 3, 6
LORA = {"lora_rank": RANK, "lora_alpha": 9.0}
FULL = {"recompute_granularity": "full"}
ONLY_MLP = {"lora_targets": ("linear_fc1", "linear_fc2")}
DYLORA = {"dylora": True}
FROZEN = {"dylora": True, "dylora_frozen": True}
LISTED = {"dylora": True, "dylora_ranks": (2, 6)}
LAYOUTS = {
    "one process": (1, {}),
    "one process full recompute": (1, FULL),
    "one process mlp recompute of mlp": (
        1,
        {**ONLY_MLP, "recompute_granularity": "selective", "recompute_modules": ("mlp",)},
    ),
    "own norms and heads": (1, {**OWN, **UNTIED}),
    "attention only": (1, {"lora_targets": ("linear_proj", "linear_qkv")}),
    "tp2": (2, TP2),
    "tp2 sequence parallel": (2, {**TP2, **SP}),
    "pp2": (2, PP2),
    "pp2 chunks2": (2, {**PP2, **CHUNKS}),
    "tp2 pp2 sequence parallel untied": (4, {**TP2, **PP2, **SP, **UNTIED}),
    "tp2 pp2 chunks2 sequence parallel full own": (
        4,
        {**TP2, **PP2, **CHUNKS, **SP, **FULL, **OWN},
    ),
    "dp2 distributed overlap": (2, OVERLAP),
    "dp2 distributed overlap untied own": (2, {**OVERLAP, **UNTIED, **OWN}),
    "pp2 dp2 distributed overlap": (4, {**OVERLAP, **PP2}),
    "tp2 dp2 distributed sequence parallel": (4, {**TP2, **SP, "use_distributed_optimizer": True}),
    "one process drawn exits": (1, {"exit_sampling": "uniform", "num_sampled_exits": 1}),
    "dylora": (1, DYLORA),
    "dylora frozen": (1, FROZEN),
    "dylora listed tp2 sequence parallel": (2, {**LISTED, **TP2, **SP}),
    "dylora frozen tp2 pp2 sequence parallel full": (4, {**FROZEN, **TP2, **PP2, **SP, **FULL}),
    "dylora frozen dp2 distributed overlap": (2, {**FROZEN, **OVERLAP}),
}


def is_trained(name: str) -> bool:
    return is_adapter(name) or name.startswith(TRAINED_EXIT_PARTS)


def assert_copies_equal(copies: dict[str, list[torch.Tensor]]) -> None:
    """Check that shards are equal on all ranks that hold a copy.

    These are data parallel ranks and stages, and tensor parallel ranks for what they do not split.
    """
    assert all(torch.equal(tensor, tensors[0]) for tensors in copies.values() for tensor in tensors)
    column = ("linear_qkv.lora_a", "linear_fc1.lora_a", "linear_proj.lora_b", "linear_fc2.lora_b")
    whole = [key for key in copies if key.split(" shard ")[0].endswith(column)]
    assert all(
        torch.equal(copies[key][0], copies[f"{key.split(' shard ')[0]} shard 0"][0])
        for key in whole
    )


@pytest.mark.parametrize(
    "name",
    thinned(
        LAYOUTS,
        "one process",
        "one process mlp recompute of mlp",
        "attention only",
        "tp2 sequence parallel",
        "pp2 chunks2",
        "tp2 pp2 sequence parallel untied",
        "tp2 pp2 chunks2 sequence parallel full own",
        "pp2 dp2 distributed overlap",
        "tp2 dp2 distributed sequence parallel",
        "dylora",
        "dylora listed tp2 sequence parallel",
        "dylora frozen tp2 pp2 sequence parallel full",
        "dylora frozen dp2 distributed overlap",
    ),
)
def test_adapters_in_a_layout_equal_the_reference(name):
    world_size, changes = LAYOUTS[name]
    settings = tiny(**{**LORA, **changes})
    reports = run_ranks(world_size, train_adapters, settings, STEPS)
    initial, copies = join_ranks([report["initial"] for report in reports])
    losses, norms, gradients, weights = reference_adapters(settings, initial, STEPS)
    for step, expected in enumerate(losses):
        assert reports[0]["losses"][step] == pytest.approx(expected, rel=1e-5)
        assert reports[0]["grad_norms"][step] == pytest.approx(norms[step], rel=1e-5)
    (got_gradients, _), (got, last) = (
        join_ranks([report[key] for report in reports]) for key in ("gradients", "weights")
    )
    assert {key for key in got if is_trained(key)} == gradients.keys()
    assert sum(
        weight.numel() for key, weight in got.items() if is_adapter(key)
    ) == adapter_parameters(settings)
    for key, gradient in gradients.items():
        assert relative(got_gradients[key], gradient) < 1e-5, (
            f"gradient of {key}: {relative(got_gradients[key], gradient)}"
        )
    for key, weight in weights.items():
        real = slice(
            0, settings.vocab_size if "embedding" in key or "output_layer" in key else None
        )
        if is_trained(key):
            assert relative(got[key][real], weight[real]) < 1e-5, (
                f"weight {key}: {relative(got[key][real], weight[real])}"
            )
        else:
            assert torch.equal(got[key], initial[key]), f"{key} is frozen"
    assert_copies_equal(copies)
    assert_copies_equal(last)
    if (
        settings.dylora_frozen
    ):  # what no step has drawn yet has gradient 0, and what is below the drawn one too
        drawn = rank_at(settings, 0)
        others = [at for at in range(RANK) if at != drawn - 1]
        for key in (key for key in got_gradients if is_adapter(key)):
            gradient = got_gradients[key] if key.endswith("lora_a") else got_gradients[key].t()
            assert gradient[drawn - 1].abs().max() > 0 and not gradient[others].any(), key


@pytest.mark.parametrize("world_size, changes", [(1, {}), (4, {**TP2, **PP2, **CHUNKS})])
def test_the_first_values_are_the_same_in_every_layout_and_the_network_is_that_without(
    world_size, changes
):
    bare, _ = join_ranks(
        [report["initial"] for report in run_ranks(world_size, train_adapters, tiny(**changes), 0)]
    )
    one, _ = join_ranks(
        [report["made"] for report in run_ranks(1, train_adapters, tiny(**LORA), 0)]
    )
    made, _ = join_ranks(
        [
            report["made"]
            for report in run_ranks(world_size, train_adapters, tiny(**LORA, **changes), 0)
        ]
    )
    adapters = [key for key in made if is_adapter(key)]
    assert set(made) - set(adapters) == set(bare) and len(adapters) == 2 * 4 * 4
    assert all(torch.equal(made[key], bare[key]) for key in bare)
    assert all(torch.equal(made[key], one[key]) for key in adapters)
    for key in adapters:
        bound = made[key].shape[1] ** -0.5  # of A: 1 / sqrt(in)
        assert (
            not made[key].any()
            if key.endswith("b")
            else 0.9 * bound < made[key].abs().max() <= bound
        )
    assert len({made[key].sum().item() for key in adapters if key.endswith("a")}) == 16, (
        "every A has values of its own"
    )


def test_the_optimizer_keeps_state_of_the_adapters_only():
    settings = tiny(**LORA)
    (report,) = run_ranks(1, train_adapters, settings, 1)
    assert {name for name, trains in report["names"] if trains} == {
        name for name, _ in report["names"] if is_adapter(name)
    }
    assert (
        report["state_elements"]
        == adapter_parameters(settings)
        == 4 * RANK * (64 + 32 + 32 + 32 + 96 + 32 + 32 + 48)
    )


def test_bf16_adapters_learn_and_the_network_keeps_its_bits():
    settings = tiny(**LORA, bf16=True, **OVERLAP, **TP2, **SP)
    reports = run_ranks(4, train_adapters, settings, 6)
    (before, _), (after, copies) = (
        join_ranks([report[key] for report in reports]) for key in ("initial", "weights")
    )
    _, _, _, expected = reference_adapters(settings, before, 6)
    for key in before:
        assert torch.equal(before[key], after[key]) != is_adapter(key), key
        if is_adapter(
            key
        ):  # what was learned, within the rounding of weights and activations of 8 bits
            assert relative(after[key] - before[key], expected[key] - before[key]) < 0.15, key
    assert_copies_equal(copies)


def test_dropout_is_the_same_on_tensor_parallel_ranks_where_they_read_the_same():
    reads_alike = {"lora_dropout": 0.4, "lora_targets": ("linear_qkv", "linear_fc1"), **LORA}
    (one,), two = (
        run_ranks(1, train_adapters, tiny(**reads_alike), 2),
        run_ranks(2, train_adapters, tiny(**reads_alike, **TP2), 2),
    )
    (plain,) = run_ranks(1, train_adapters, tiny(**{**reads_alike, "lora_dropout": 0.0}), 2)
    weights = [
        join_ranks([report["weights"] for report in reports]) for reports in ([one], two, [plain])
    ]
    for key in (key for key in weights[0][0] if is_adapter(key)):
        # initial weights of the layouts differ, so only the copies are compared
        assert not torch.equal(weights[0][0][key], weights[2][0][key])
    assert_copies_equal(weights[1][1])
    assert all(
        abs(one["losses"][0][depth] - plain["losses"][0][depth]) > 1e-5 for depth in (1, 2, 3, 4)
    )


RESUMES = {
    "tp2 sequence parallel -> pp2": (2, {**TP2, **SP}, 2, PP2),
    "pp2 chunks2 -> tp2 distributed": (
        2,
        {**PP2, **CHUNKS},
        4,
        {**TP2, "use_distributed_optimizer": False},
    ),
    "dylora dp2 distributed overlap -> tp2 sequence parallel": (
        2,
        {**OVERLAP, **DYLORA},
        4,
        {**OVERLAP, **DYLORA, **TP2, **SP},
    ),
}


@pytest.mark.parametrize("name", RESUMES)
def test_a_run_is_resumed_in_another_layout(name, tmp_path):
    first_size, first, then_size, then = RESUMES[name]
    reports = run_ranks(
        first_size, train_adapters, tiny(**LORA, **first), 2, 0, None, str(tmp_path)
    )
    initial, _ = join_ranks([report["initial"] for report in reports])
    saved, _ = join_ranks([report["weights"] for report in reports])
    losses, _, _, weights = reference_adapters(tiny(**LORA, **first), initial, 4)
    reports = run_ranks(then_size, train_adapters, tiny(**LORA, **then), 4, 2, str(tmp_path))
    loaded, _ = join_ranks([report["initial"] for report in reports])
    # the number of rows that pad the vocabulary depends on the layout
    saved, loaded, weights = (
        {
            key: tensor[:VOCABULARY] if "embedding" in key else tensor
            for key, tensor in computed.items()
        }
        for computed in (saved, loaded, weights)
    )
    assert loaded.keys() == saved.keys() and all(
        torch.equal(loaded[key], saved[key]) for key in saved
    )
    got, _ = join_ranks([report["weights"] for report in reports])
    for step, expected in enumerate(losses[2:]):
        assert reports[0]["losses"][step] == pytest.approx(expected, rel=1e-5)
    assert all(relative(got[key][: len(weights[key])], weights[key]) < 1e-5 for key in weights)
