"""Gradient norm, agreement and accept length of exits in every layout, against plain PyTorch."""

import math

import pytest
import torch

from megatron_sorted.settings.derived import exit_depths
from megatron_sorted.settings.run import Settings
from tests.support.gather import join_ranks
from tests.support.layouts import (
    CHUNKS,
    DISTRIBUTED,
    OWN,
    PP2,
    SEQUENCE,
    TP2,
    UNTIED,
    pairwise,
    thinned,
)
from tests.support.measure_bodies import batch_checksum, broken_exit, measure, shared_choice
from tests.support.ranks import run_ranks
from tests.support.reference import exit_logits
from tests.support.tiny import make_samples, tiny

PP2_CHUNKS = {**PP2, **CHUNKS}
OWN_UNTIED = {**OWN, **UNTIED}
LAYOUTS = {
    "one process": (1, {}),
    "one process own heads": (1, OWN_UNTIED),
    "pp2": (2, PP2),
    "pp2 chunks": (2, {**PP2_CHUNKS, **OWN_UNTIED}),
    "tp2": (2, TP2),
    "tp2 sequence parallel": (2, SEQUENCE),
    "dp2": (2, {}),
    "dp2 distributed overlap": (
        2,
        {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
    "pp2 dp2": (4, PP2),
    "tp2 pp2 chunks sequence parallel": (4, {**SEQUENCE, **PP2_CHUNKS}),
    "pp4 no exit on the third stage": (
        4,
        {"pipeline_model_parallel_size": 4, "exit_layer_nums": (1, 2)},
    ),
}
STEPS = 2


def expected_step(
    settings: Settings, weights: dict, step: int, unequal: bool, packed: bool, coefficients: dict
) -> dict:
    """Return {depth: (gradient norm, agreement, accept length)} of one step.

    The last two are None where the last exit does not train.
    """
    samples = make_samples(
        settings.global_batch_size, settings.seq_length, 100 + step, unequal, packed
    )
    mask, labels = samples["mask"], samples["labels"]
    taps = {}

    def read(depth: int, x: torch.Tensor) -> torch.Tensor:
        # a leaf, whose gradient comes from this exit alone
        taps[depth] = x.detach().clone().requires_grad_()
        return taps[depth]

    logits = exit_logits(
        weights,
        samples["tokens"],
        samples["segments"] if packed else None,
        exit_depths(settings),
        settings.num_attention_heads,
        settings.num_query_groups,
        settings.vocab_size,
        settings.norm_epsilon,
        read,
    )
    numbers = {}
    for depth, coefficient in coefficients.items():
        losses = (
            torch.nn.functional.cross_entropy(
                logits[depth].transpose(1, 2), labels, reduction="none"
            )
            * mask
        )
        if settings.calculate_per_token_loss:
            loss = losses.sum() / mask.sum()
        else:
            size = settings.micro_batch_size
            parts = list(zip(losses.split(size), mask.split(size), strict=True))
            loss = sum(part.sum() / m.sum() for part, m in parts) / len(parts)
        [gradient] = torch.autograd.grad(coefficient * loss, taps[depth])
        norm = gradient.double().norm().item()
        if settings.num_layers in coefficients:
            agree = logits[depth].argmax(-1) == logits[settings.num_layers].argmax(-1)
            numbers[depth] = (
                norm,
                *runs(agree, mask, samples["segments"], settings.num_draft_tokens),
            )
        else:
            numbers[depth] = (norm, None, None)
    if settings.num_layers in coefficients:
        numbers[settings.num_layers] = (*numbers[settings.num_layers][:2], 1.0)
    return numbers


def runs(
    agree: torch.Tensor, mask: torch.Tensor, segments: torch.Tensor, drafted: int
) -> tuple[float, float]:
    """Return agreement and accept length by walking from every counted token along its document."""
    seen, agreed = [0] * drafted, [0] * drafted
    for row in range(agree.size(0)):
        for start in range(agree.size(1)):
            for k in range(drafted):
                at = start + k
                if (
                    at >= agree.size(1)
                    or not mask[row, at]
                    or segments[row, at] != segments[row, start]
                ):
                    break
                seen[k] += 1
                if not agree[row, at]:
                    break
                agreed[k] += 1
    chances = [a / s if s else 0.0 for a, s in zip(agreed, seen, strict=True)]
    return agreed[0] / seen[0], 1 + sum(math.prod(chances[: k + 1]) for k in range(drafted))


def check(
    world_size: int,
    settings: Settings,
    unequal: bool = False,
    packed: bool = False,
    tolerance: float = 1e-5,
) -> list[dict]:
    """Compare every rank's report with plain PyTorch on the same weights; return the reports."""
    reports = run_ranks(world_size, measure, settings, STEPS, unequal, packed)
    squares: dict[int, list[float]] = {}
    for step in range(STEPS):
        weights, _ = join_ranks([report["weights"][step] for report in reports])
        coefficients = reports[0]["coefficients"][step]
        expected = expected_step(settings, weights, step, unequal, packed, coefficients)
        tokens = make_samples(
            settings.global_batch_size, settings.seq_length, 100 + step, unequal, packed
        )["tokens"]
        for report in reports:
            interval = report["steps"][step]
            assert interval.exits.keys() == expected.keys()
            for depth, (norm, agreement, length) in expected.items():
                numbers = interval.exits[depth]
                assert numbers.grad_norm == pytest.approx(norm, rel=tolerance), (
                    f"gradient norm of exit {depth} at step {step}"
                )
                assert numbers.agreement == (agreement and pytest.approx(agreement, rel=1e-9)), (
                    f"agreement of exit {depth}"
                )
                assert numbers.accept_length == (length and pytest.approx(length, rel=1e-9)), (
                    f"accept length of exit {depth}"
                )
            assert interval.checksum == batch_checksum(tokens) % 2**32
            assert interval.memory_bytes == 999 + world_size
            assert interval.phases == ({"data": world_size - 1.0, "optimizer": 5.0} if step else {})
        assert all(report["bad"][step] == ({}, 0.0) for report in reports)
        for depth, (norm, *_) in expected.items():
            squares.setdefault(depth, []).append(norm**2)
    # over an interval: the root mean square of the steps in which the exit trained
    for depth, values in squares.items():
        assert reports[0]["interval"].exits[depth].grad_norm == pytest.approx(
            math.sqrt(sum(values) / len(values)), rel=tolerance
        )
    return reports


@pytest.mark.parametrize("name", pairwise(LAYOUTS))
def test_measures_equal_plain_pytorch(name):
    world_size, changes = LAYOUTS[name]
    reports = check(world_size, tiny(**changes))
    exits = reports[0]["steps"][0].exits
    if "untie_exit_output_weights" not in changes:  # heads of their own agree by chance only
        assert all(0 < exits[depth].agreement < 1 for depth in exits if depth != 4), (
            "exits must neither always nor never agree"
        )


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize(
    "name",
    thinned(
        ["one process", "pp2 chunks", "tp2 sequence parallel", "dp2", "pp2 dp2"],
        "pp2 chunks",
        "tp2 sequence parallel",
        "dp2",
    ),
)
def test_packed_documents_and_unequal_samples(name, per_token):
    world_size, changes = LAYOUTS[name]
    check(
        world_size, tiny(calculate_per_token_loss=per_token, **changes), unequal=True, packed=True
    )


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [(1, {}), (2, PP2), (2, PP2_CHUNKS), (2, {"overlap_grad_reduce": True})],
)
def test_sampled_exits(world_size, changes):
    reports = check(
        world_size, tiny(exit_sampling="uniform", num_sampled_exits=2, seed=7, **changes)
    )
    drawn = [set(c) for c in reports[0]["coefficients"]]
    assert any(4 in d for d in drawn) and any(4 not in d for d in drawn), (
        "one step must train the last exit and one must not"
    )


@pytest.mark.parametrize(("world_size", "changes"), [(1, {}), (2, PP2), (2, SEQUENCE)])
def test_listed_coefficients_and_another_number_of_drafted_tokens(world_size, changes):
    check(world_size, tiny(exit_layer_weight=(0.5, 0.0, 0.25), num_draft_tokens=7, **changes))


@pytest.mark.parametrize(("world_size", "changes"), [(1, {}), (2, PP2), (2, TP2)])
@pytest.mark.parametrize("per_token", [True, False])
def test_the_loss_scale_leaves_no_trace(world_size, changes, per_token):
    settings = tiny(fp16=True, calculate_per_token_loss=per_token, **changes)
    norms = []
    for scale in (1.0, 1024.0):
        [report, *_] = run_ranks(
            world_size, measure, tiny(**{**vars(settings), "loss_scale": scale}), 1, True, False
        )
        norms.append(
            {depth: numbers.grad_norm for depth, numbers in report["steps"][0].exits.items()}
        )
    [exact, *_] = run_ranks(
        world_size, measure, tiny(calculate_per_token_loss=per_token, **changes), 1, True, False
    )
    for depth, numbers in exact["steps"][0].exits.items():
        assert norms[0][depth] == pytest.approx(numbers.grad_norm, rel=1e-2) and norms[1][
            depth
        ] == pytest.approx(numbers.grad_norm, rel=1e-2)


@pytest.mark.parametrize(
    "name", ["one process", "pp2 chunks", "tp2 sequence parallel", "dp2 distributed overlap"]
)
def test_a_step_that_does_not_compare_communicates_no_more_and_computes_the_same(name):
    world_size, changes = LAYOUTS[name]
    settings = tiny(**changes)
    compared, plain, bare = (
        run_ranks(world_size, measure, settings, STEPS, False, False, *flags)
        for flags in ((True, True), (False, True), (False, False))
    )
    for with_comparison, without, unmeasured in zip(compared, plain, bare, strict=True):
        assert without["collectives"] == unmeasured["collectives"]
        for name in without["final"]:
            for (a, *_), (b, *_), (c, *_) in zip(
                with_comparison["final"][name],
                without["final"][name],
                unmeasured["final"][name],
                strict=True,
            ):
                assert torch.equal(a, b) and torch.equal(b, c)
        for step in range(STEPS):
            added = {
                key: with_comparison["collectives"][step][key] - count
                for key, count in without["collectives"][step].items()
            }
            assert added["broadcast"] == (settings.pipeline_model_parallel_size > 1)
            assert (added["all_reduce"] > 0) == (settings.tensor_model_parallel_size > 1)
            assert sum(added.values()) == added["broadcast"] + added["all_reduce"]
            assert all(exit_.agreement is None for exit_ in without["steps"][step].exits.values())


@pytest.mark.parametrize(("world_size", "changes"), [(1, {}), (2, PP2), (2, SEQUENCE)])
def test_the_rank_of_a_broken_exit_names_it(world_size, changes):
    settings = tiny(untie_exit_output_weights=True, **changes)
    for report in run_ranks(world_size, broken_exit, settings, 2):
        # layers below the exit get its NaN; other exits stay finite
        assert (report["bad"], report["flag"]) == (
            ({2: ["loss", "gradient"]}, 1.0) if report["stage"] == 0 else ({}, 0.0)
        )


# 12 rows a rank: equal ones begin on the first rank, on the second, and where the second holds
# padding only
@pytest.mark.parametrize(("vocabulary", "alike_from"), [(24, 5), (24, 14), (12, 5)])
def test_of_equally_likely_tokens_on_several_ranks_the_lowest_id_is_chosen(vocabulary, alike_from):
    first, second = run_ranks(2, shared_choice, 12, vocabulary, alike_from)
    assert first == second and set(first) == {0, alike_from}
