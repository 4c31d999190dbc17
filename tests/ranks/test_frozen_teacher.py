"""A frozen teacher in every layout: equal to plain PyTorch taught by transformers' logits."""

import dataclasses

import pytest
import torch

from megatron_sorted.errors import SettingsError
from megatron_sorted.training.step.teacher import check_teacher
from tests.ranks.test_distillation import (
    CHUNKS,
    DEEP,
    OVERLAP,
    OWN,
    PP2,
    PP4,
    SEQUENCE,
    TP2,
    UNTIED,
)
from tests.ranks.test_layouts import compare, mean_by_rule
from tests.support.hugging_face import make_model
from tests.support.layouts import thinned
from tests.support.ranks import run_ranks
from tests.support.taught import Objective
from tests.support.tiny import tiny

TAUGHT = {"exit_kd_weight": 0.7, "exit_kd_temperature": 2.0}
LAYOUTS = {
    "one process": (1, {}),
    "own untied": (1, {**OWN, **UNTIED}),
    "tp2": (2, TP2),
    "tp2 sequence parallel": (2, SEQUENCE),
    "pp2": (2, PP2),
    "pp2 own untied": (2, {**PP2, **OWN, **UNTIED}),
    "pp2 chunks2": (2, {**PP2, **CHUNKS}),
    "pp4": (4, PP4),
    "pp4 full recompute": (4, {**PP4, "recompute_granularity": "full"}),
    "pp2 uneven first": (2, {**PP2, "decoder_first_pipeline_num_layers": 1}),
    "pp4 chunks2 8 layers own": (4, {**PP4, **CHUNKS, **DEEP, **OWN}),
    "tp2 pp2 sequence parallel": (4, {**SEQUENCE, **PP2}),
    "dp2 distributed overlap own": (2, {**OVERLAP, **OWN, **UNTIED}),
    "pp2 chunks2 dp2 distributed overlap": (4, {**OVERLAP, **PP2, **CHUNKS}),
}


class Teacher:
    """A random model of transformers, saved in a directory; a call returns its logits."""

    def __init__(self, directory, num_layers=4, tied=True, name="Llama", **changes):
        torch.manual_seed(11)
        self.model = make_model(
            name, num_hidden_layers=num_layers, tie_word_embeddings=tied, **changes
        ).eval()
        with torch.no_grad():  # far from uniform, so that there is something to learn
            for parameter in self.model.parameters():
                parameter.mul_(1.5)
        self.model.save_pretrained(directory)

    @torch.no_grad()
    def __call__(self, tokens_bs, pieces_bs):
        """Return logits [b, s, v]; documents of a sample do not see each other."""
        s = tokens_bs.size(1)
        allowed = (
            torch.ones(s, s, dtype=torch.bool).tril()[None, None].expand(tokens_bs.size(0), 1, s, s)
        )
        if pieces_bs is not None:
            allowed = allowed & (pieces_bs[:, None, :, None] == pieces_bs[:, None, None, :])
        window = getattr(self.model.config, "sliding_window", None)
        if window:
            near = torch.arange(s)[:, None] - torch.arange(s)[None] < window
            allowed = allowed & near
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        return self.model(tokens_bs, attention_mask=mask, position_ids=torch.arange(s)[None]).logits


def check(world_size, settings, teacher, **options):
    """Compare a layout with the reference, also divergences; return the ranks' reports."""
    objective = Objective(mean_by_rule, teach=teacher)
    reports = compare(world_size, settings, 1e-5, objective=objective, **options)
    for kd, exits in zip(objective.kd, reports[0]["exits"], strict=True):
        for depth, numbers in exits.items():
            assert numbers.kd == pytest.approx(kd[depth], rel=2e-5, abs=3e-7), (
                f"divergence of exit {depth}"
            )
    return reports


@pytest.mark.parametrize(
    "name",
    thinned(
        LAYOUTS,
        "one process",
        "tp2 sequence parallel",
        "pp2 own untied",
        "pp4 full recompute",
        "pp2 uneven first",
        "pp4 chunks2 8 layers own",
        "tp2 pp2 sequence parallel",
        "dp2 distributed overlap own",
        "pp2 chunks2 dp2 distributed overlap",
    ),
)
def test_exits_equal_the_reference(name, tmp_path):
    world_size, changes = LAYOUTS[name]
    teacher = Teacher(tmp_path, num_layers=changes.get("num_layers", 4))
    check(world_size, tiny(exit_kd_teacher=str(tmp_path), **TAUGHT, **changes), teacher)


@pytest.mark.parametrize(
    ("name", "layers", "options"),
    [
        ("one process", 3, {"tied": False}),
        ("pp2 chunks2", 8, {"tied": False}),
        ("pp2 uneven first", 6, {}),
        ("tp2 pp2 sequence parallel", 4, {"name": "Mistral", "sliding_window": 5}),
        ("pp2", 2, {"name": "Qwen3", "head_dim": 16}),
    ],
)
@pytest.mark.parametrize("per_token", thinned([True, False], True))
def test_other_depths_and_families_packed_documents(name, layers, options, per_token, tmp_path):
    world_size, changes = LAYOUTS[name]
    teacher = Teacher(tmp_path, layers, **options)
    check(
        world_size,
        tiny(
            exit_kd_teacher=str(tmp_path), calculate_per_token_loss=per_token, **TAUGHT, **changes
        ),
        teacher,
        unequal=True,
        packed=True,
    )


@pytest.mark.parametrize("name", ["one process", "pp2", "pp4"])
def test_a_teacher_does_not_make_drawn_exits_run_deeper(name, tmp_path):
    world_size, changes = LAYOUTS[name]
    teacher = Teacher(tmp_path)
    reports = check(
        world_size,
        tiny(exit_kd_teacher=str(tmp_path), exit_sampling="uniform", seed=5, **TAUGHT, **changes),
        teacher,
    )
    assert any(4 not in drawn for drawn in reports[0]["coefficients"])


def test_an_ordinary_model_is_taught_too(tmp_path):
    teacher = Teacher(tmp_path)
    check(
        2,
        tiny(
            exit_layer_nums=(),
            exit_kd_teacher=str(tmp_path),
            exit_kd_weight=1.0,
            exit_kd_top_k=9,
            **PP2,
        ),
        teacher,
    )


@pytest.mark.parametrize("name", ["one process", "pp4", "tp2 pp2 sequence parallel"])
def test_half_precision_is_near(name, tmp_path):
    from tests.support.rank_bodies import train_and_report

    world_size, changes = LAYOUTS[name]
    Teacher(tmp_path)
    taught = {**TAUGHT, "exit_kd_teacher": str(tmp_path)}
    half = run_ranks(
        world_size, train_and_report, tiny(bf16=True, **taught, **changes), 1, True, True
    )[0]["exits"][0]
    exact = run_ranks(world_size, train_and_report, tiny(**taught, **changes), 1, True, True)[0][
        "exits"
    ][0]
    for depth, numbers in exact.items():
        assert half[depth].loss == pytest.approx(numbers.loss, rel=5e-3) and half[
            depth
        ].kd == pytest.approx(numbers.kd, rel=3e-2)


def test_a_model_that_cannot_teach_is_refused(tmp_path):
    Teacher(tmp_path / "wide", hidden_size=64)
    Teacher(tmp_path / "odd", num_layers=3)
    for directory, changes, message in (
        ("wide", {}, "has --hidden-size 64 and this network 32"),
        ("none", {}, "none"),
        ("odd", PP2, "3 layers, which 2 stages of 1 chunks cannot share evenly"),
    ):
        settings = tiny(exit_kd_teacher=str(tmp_path / directory), **TAUGHT, **changes)
        with pytest.raises(SettingsError, match=message):
            check_teacher(settings)
    check_teacher(dataclasses.replace(settings, pipeline_model_parallel_size=1))
