"""Schedules against their closed forms, and against orders written by hand."""

import pytest

from megatron_sorted.planning.schedule import (
    SIMULATED,
    Pass,
    most_alive,
    passes_of_stage,
    time_of_passes,
)


def written(text: str) -> list[Pass]:
    """Return passes from words such as F0.1: forward, chunk 0, micro-batch 1."""
    return [Pass(word[0] == "F", int(word[1]), int(word[3:])) for word in text.split()]


def test_one_forward_one_backward():
    assert passes_of_stage(0, 2, 1, 3) == written("F0.0 F0.1 B0.0 F0.2 B0.1 B0.2")
    assert passes_of_stage(1, 2, 1, 3) == written("F0.0 B0.0 F0.1 B0.1 F0.2 B0.2")
    assert passes_of_stage(0, 1, 1, 2) == written("F0.0 B0.0 F0.1 B0.1")


def test_interleaved():
    # Megatron: (2 - 0 - 1) * 2 + (2 - 1) * 2 = 4 forwards before the first pair on stage 0, 2 on
    # stage 1
    assert passes_of_stage(0, 2, 2, 2) == written("F0.0 F0.1 F1.0 F1.1 B1.0 B1.1 B0.0 B0.1")
    assert passes_of_stage(1, 2, 2, 2) == written("F0.0 F0.1 F1.0 B1.0 F1.1 B1.1 B0.0 B0.1")


@pytest.mark.parametrize(
    ("stages", "chunks", "micro_batches"), [(1, 1, 3), (4, 1, 7), (2, 2, 8), (4, 4, 32), (3, 2, 6)]
)
def test_a_step_without_messages_lasts_as_the_bubble_formula_says(stages, chunks, micro_batches):
    # Narayanan et al., arXiv 2104.04473: the bubble is (p - 1) / (v m) of the time without one
    timing = time_of_passes(
        [[1.0] * chunks] * stages, [[2.0] * chunks] * stages, 0.0, micro_batches
    )
    assert timing.seconds == pytest.approx(
        3 * chunks * micro_batches * (1 + (stages - 1) / (chunks * micro_batches))
    )
    assert timing.busy_seconds == (3 * chunks * micro_batches,) * stages


def test_messages_and_a_slow_stage_delay():
    # F of both, message between, B of both, message back
    assert time_of_passes([[1.0], [1.0]], [[2.0], [2.0]], 0.5, 1).seconds == 7.0
    # the slow stage computes without a pause once it has begun
    assert time_of_passes([[1.0], [3.0]], [[1.0], [3.0]], 0.0, 4).seconds == 1 + 4 * 6 + 1


def test_long_steps_are_what_a_longer_simulation_says(monkeypatch):
    forward, backward = [[1.0, 1.2], [1.1, 0.9]], [[2.0, 2.1], [2.5, 2.2]]
    short = time_of_passes(forward, backward, 0.1, 60).seconds
    monkeypatch.setattr("megatron_sorted.planning.schedule.SIMULATED", 10 * SIMULATED)
    assert short == pytest.approx(time_of_passes(forward, backward, 0.1, 60).seconds, rel=1e-3)


def test_most_alive_in_one_forward_one_backward_is_the_distance_to_the_end():
    for stage in range(4):
        assert most_alive(passes_of_stage(stage, 4, 1, 8), [5.0]) == 5.0 * (4 - stage)
    # clusters' example: stage 0 of 4 with 4 chunks holds 2 x 3 + 3 x 4 + 1 = 19 chunks
    assert most_alive(passes_of_stage(0, 4, 4, 32), [1.0] * 4) == 19
