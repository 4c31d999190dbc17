"""Scores of the decoding benchmark, from hand-made numbers."""

from types import SimpleNamespace

import pytest
import torch

from megatron_sorted.benchmark.curve import ExitScores, Point, best_within, pareto_front
from megatron_sorted.benchmark.peer import until_end
from megatron_sorted.benchmark.sweep import Sweep
from megatron_sorted.benchmark.trials import StrategyTrial, run_all, share_same
from megatron_sorted.decoding.strategies import EarlyExit, Fixed, Full, SelfSpeculative

DEPTHS = [1, 2, 4]
SCORES = ExitScores(
    torch.tensor([[4.0, 1.0, 8.0], [3.0, 2.0, 6.0], [1.0, 3.0, 5.0]]),
    {"margin": torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.9, 0.6], [1.0, 1.0, 1.0]])},
)


@pytest.mark.parametrize(
    ("strategy", "loss"),
    [
        (Full(), 3.0),
        (SelfSpeculative(1), 3.0),
        (Fixed(1), 13 / 3),
        (Fixed(2), 11 / 3),
        (
            EarlyExit((1, 2), (0.6, 0.5), "margin"),
            (1.0 + 1.0 + 6.0) / 3,
        ),  # the second token leaves at 1, the third at 2
        (EarlyExit((2,), (0.6,), "margin"), (1.0 + 2.0 + 5.0) / 3),  # above, not at, its threshold
        (EarlyExit((1, 2), (1.0, 1.0), "margin"), 3.0),
    ],
)
def test_each_token_has_the_loss_of_the_first_confident_exit(strategy, loss):
    assert SCORES.loss_of(strategy, DEPTHS) == pytest.approx(loss)


def test_the_front_leaves_out_what_is_deeper_and_worse():
    strategies = {
        "shallow": EarlyExit((1,), (0.6,), "margin"),
        "worse": EarlyExit((2,), (0.15,), "margin"),
        "fixed @1": Fixed(1),
    }
    # mean depths 3 and 2; losses (1 + 1 + 5) / 3 and (3 + 2 + 6) / 3: both on the front
    assert list(pareto_front(SCORES, strategies, DEPTHS, 16)) == ["shallow", "worse", "fixed @1"]
    strategies["deeper and no better"] = EarlyExit((1,), (0.95,), "margin")
    assert "deeper and no better" not in pareto_front(SCORES, strategies, DEPTHS, 16)
    many = {f"{value:.2f}": EarlyExit((1,), (value,), "margin") for value in (0.05, 0.3, 0.6)}
    assert len(pareto_front(SCORES, many, DEPTHS, 2)) == 2


def test_the_fastest_within_a_loss():
    points = [
        Point("full", "full", 3.0, 0.0, 10, 1.0, 1.0),
        Point("sure", "early_exit", 3.02, 0.007, 20, 2.0, 0.9),
        Point("hasty", "early_exit", 3.2, 0.07, 40, 4.0, 0.5),
        Point("drafts", "lossless", 3.0, 0.0, 30, 3.0, 1.0),
    ]
    assert best_within(points, 0.01).name == "sure" and best_within(points, 0.1).name == "hasty"
    assert best_within(points[:1], 0.01) is None


def test_shares_and_speeds():
    base = StrategyTrial([[1, 2, 3, 4], [5, 6]], [1.0, 2.0], 6)
    assert base.tokens_per_second == 2.0 and base.tokens_per_step == 1.0
    assert share_same(base, base) == 1.0
    assert share_same(StrategyTrial([[1, 2, 9, 4], [5]], [1.0]), base) == 3 / 6
    assert until_end([4, 2, 7, 2], frozenset({2})) == [4, 2] and until_end([4], frozenset({2})) == [
        4
    ]


def test_fewer_prompts_than_a_batch_are_repeated():
    generator = SimpleNamespace(network=SimpleNamespace(device=torch.device("cpu")))
    seen = []
    runs = {"echo": lambda some: (seen.append(some) or some, 0)}
    trial = run_all(runs, [[1], [2], [3]], generator, "trial", 8)["echo"]
    assert (
        seen[1:] == [[[1], [2], [3], [1], [2], [3], [1], [2]]]
        and trial.num_tokens == 8
        and len(trial.seconds) == 1
    )


def test_the_best_point_of_a_sweep():
    assert Sweep((1, 2), (2, 4), [[1.1, 1.5], [1.4, 1.3]], [[1, 2], [2, 3]]).best == (1, 4, 1.5)
