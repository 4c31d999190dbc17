"""The measurement of whole runs: clocks, counts and pages, with numbers chosen by hand."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lab.benchmarks.bounds import measure_bounds
from lab.benchmarks.checkpoint_page import parameters_of, write_checkpoint_page
from lab.benchmarks.jobs import CaseResult, run_arguments
from lab.benchmarks.loop_page import verdicts, write_loop_page
from lab.benchmarks.pages import rounded
from lab.benchmarks.run_cases import RunCase, checkpoint_cases, loop_cases
from lab.benchmarks.run_numbers import (
    checkpoint_row,
    cost_of_comparing,
    loop_row,
    steps_beside_saves,
    waiting,
)
from lab.benchmarks.tally import REST, Tally
from megatron_sorted.settings.load import load_settings
from megatron_sorted.settings.rules import check_settings


class Clock:
    """A clock that `works` advances; CPU time runs at half the speed."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> tuple[float, float]:
        return self.now, self.now / 2

    def works(self, seconds: float) -> None:
        self.now += seconds


def test_causes_inside_causes_add_up_to_the_step():
    clock = Clock()
    tally = Tally(clock)
    place = SimpleNamespace(inner=lambda: clock.works(1.0))
    tally.wrap(place, "inner", "inner")

    def outer() -> str:
        clock.works(2.0)
        place.inner()
        clock.works(4.0)
        return "done"

    place.outer = outer
    tally.wrap(place, "outer", "outer")
    clock.works(8.0)
    assert place.outer() == "done"
    place.inner()
    tally.next_step()
    clock.works(16.0)
    tally.next_step()
    assert tally.steps == [
        {REST: (8.0, 4.0), "outer": (6.0, 3.0), "inner": (2.0, 1.0)},
        {REST: (16.0, 8.0)},
    ]


def test_a_function_that_raises_is_booked_and_left():
    clock = Clock()
    tally = Tally(clock)

    def fails() -> None:
        clock.works(1.0)
        raise ValueError

    with pytest.raises(ValueError):
        tally.timed("fails", fails)()
    clock.works(2.0)
    tally.next_step()
    assert tally.steps == [{REST: (2.0, 1.0), "fails": (1.0, 0.5)}]


def loop_step(number: int, interval: int, schedule: float, **causes: float) -> dict:
    """Return a step of ``measure_loop`` with wall milliseconds by cause; CPU time is half."""
    seconds = {
        "forward and backward": schedule,
        "gradients set to zero": 8.0,
        "optimizer": 100.0,
        REST: 1.0,
        **{name.replace("_", " "): ms for name, ms in causes.items()},
    }
    return {
        "round": 0,
        "log_interval": interval,
        "step": number,
        "reported": number % interval == 0,
        "seconds": {name: (ms / 1e3, ms / 2e3) for name, ms in seconds.items()},
    }


def test_overhead_of_the_busiest_rank_without_waits():
    one = [
        loop_step(1, 1, 800, data=3, exits_compared=10),
        loop_step(2, 1, 900, data=5),
        loop_step(3, 10, 1, data=500),
    ]
    other = [loop_step(1, 1, 800, exits_compared=2), loop_step(2, 1, 900), loop_step(3, 10, 1)]
    row = loop_row([other, one], 1)
    # rank 1: steps of 800 + 8 + 100 + 1 + 13 and 900 + 8 + 100 + 1 + 5 ms, a wait of 10 - 2 ms in
    # the first
    assert row["rank"] == 1 and row["steps"] == 2
    assert row["step_ms"] == pytest.approx((922 + 1014) / 2)
    assert row["with_waits_ms"] == pytest.approx((14 + 6) / 2) and row["waits_ms"] == pytest.approx(
        8 / 2
    )
    assert row["overhead_ms"] == pytest.approx(6) and row["overhead_cpu_ms"] == pytest.approx(5)
    assert row["share"] == pytest.approx(6 / 968) and row["zeroing_ms"] == pytest.approx(8)
    assert waiting([other[:2], one[:2]], 0) == 0
    assert verdicts([{"layout": "a", **row}, {"layout": "b", **row, "overhead_ms": 20.1}]) == {
        "a, a report every 1: at most 2% of a step of 1 s": True,
        "b, a report every 1: at most 2% of a step of 1 s": False,
    }


def test_comparing_is_measured_on_pairs_of_steps():
    schedule = {
        4: 120.0,
        5: 100.0,
        6: 130.0,
        7: 200.0,
        8: 220.0,
    }  # steps 6 and 8 have one before them that does not compare
    steps = [loop_step(number, 2, ms) for number, ms in schedule.items()]
    result = cost_of_comparing([steps, [loop_step(number, 2, 50.0) for number in schedule]])
    assert result["pairs"] == 2
    assert result["wall_ratio"] == pytest.approx((1.3 + 1.1) / 2) and result[
        "wall_ms"
    ] == pytest.approx((30 + 20) / 2)
    assert result["cpu_ratio"] == pytest.approx(1.2) and result["cpu_ms"] == pytest.approx(12.5)


def entry(save: float, write: float, core: float) -> dict:
    """Return a round of one rank."""
    return {
        "save": save,
        "save_unverified": save - 1,
        "core": core,
        "bytes": 1200,
        "load": 3.0,
        "load_unverified": 2.0,
        "bounds": {"write": write, "read": 0.5, "memcpy": 0.5, "sha256": 0.25},
    }


def rank_numbers(slower: float = 0.0) -> dict:
    """Return what ``CheckpointTimes.measure`` returns for one rank."""
    steps = [
        {"seconds": 1.0, "saving": False},
        {"seconds": 9.0, "saving": None},
        {"seconds": 1.5, "saving": True},
        {"seconds": 1.7, "saving": True},
        {"seconds": 1.2, "saving": False},
    ]
    saves = [
        {"bytes": 1200, "stall": 0.1 + slower, "seconds": 5.0},
        {"bytes": 1200, "stall": 0.3, "seconds": 7.0},
    ]
    return {
        "first": {"held": 2.0 + slower, "stall": 1.0, "seconds": 6.0, "bytes": 1200},
        "alone": {},
        "training": {
            "save_interval": 4,
            "held": [0.25, 0.5 + slower],
            "outcomes": saves,
            "steps": steps,
        },
        "rounds": [entry(4.0 + slower, 2.0, 9.0), entry(5.0, 2.0, 3.0), entry(9.0, 3.0, 6.0)],
    }


def test_checkpoint_numbers_by_hand():
    row = checkpoint_row([rank_numbers(), rank_numbers(slower=2.0)], parameters=100)
    assert row["bytes_a_parameter"] == 12
    assert row["save"] == 6.0  # median of max(4, 6), 5, 9
    assert (
        row["held_first"] == 4.0
        and row["held"] == pytest.approx((0.25 + 2.5) / 2)
        and row["stall"] == pytest.approx((2.1 + 0.3) / 2)
    )
    assert row["background"] == 6.0
    assert row["save_over_write"] == 3.0  # of 6/2, 5/2, 9/3
    assert row["save_over_bounds"] == pytest.approx(
        6 / 3
    )  # of 6/3, 5/3, 9/4: hash 0.25 + write 2 + read 0.5 + hash 0.25 is 3
    assert (
        row["core_first"] == 9.0
        and row["core"] == 4.5
        and row["over_core"] == pytest.approx((5 / 3 + 9 / 6) / 2)
    )
    assert row["load_over_bound"] == 2.0


def test_steps_beside_saves_leave_out_those_in_which_one_begins_or_ends():
    result = steps_beside_saves(rank_numbers()["training"]["steps"])
    assert result == {
        "quiet_steps": 2,
        "saving_steps": 2,
        "quiet_step": 1.1,
        "saving_step": 1.6,
        "slowdown": pytest.approx(1.6 / 1.1),
    }
    assert steps_beside_saves([{"seconds": 1.0, "saving": False}])["slowdown"] is None


@pytest.mark.parametrize("quick", [True, False])
def test_every_case_is_a_run_that_can_start(quick):
    for case in [*loop_cases(quick), *checkpoint_cases(quick)]:
        settings = load_settings(run_arguments(case, Path("folder")))
        check_settings(settings, case.num_processes)
        assert settings.device == "cpu" and settings.save_interval is None and settings.async_save


def test_models_have_the_size_they_are_named_by():
    sizes = {parameters_of(case.settings) for case in checkpoint_cases(quick=False)}
    assert [round(size / 1e6) for size in sorted(sizes)] == [30, 120]


def test_pages_are_written(tmp_path):
    loop_case, checkpoint_case = loop_cases(quick=True)[0], checkpoint_cases(quick=True)[0]
    steps = [
        loop_step(number, interval, 100.0, data=1)
        for interval in (1, 10, 2)
        for number in range(1, 11)
    ]
    write_loop_page([CaseResult(loop_case, [steps], 0.5, 1.5, 10.0)], tmp_path)
    page = (tmp_path / "run_loop.md").read_text()
    assert page.startswith(
        "# The loop's overhead outside forward, backward and optimizer\n\n> **What this is for**: "
    )
    assert "| 1 process | 1 | 210 | 2.00 | 1.00 | 0.95% | 0.20% | 0.00 |" in page
    assert "- holds: 1 process, a report every 10: at most 2% of a step of 1 s" in page
    assert "load of the machine: 0.5 before the first run, 1.5 to 1.5 after each" in page
    write_checkpoint_page(
        [CaseResult(checkpoint_case, [rank_numbers()], 0.5, 1.5, 10.0)], tmp_path, "ext4 on a disk"
    )
    page = (tmp_path / "run_checkpoint.md").read_text()
    assert "\n\n> **What this is for**: what checkpoints cost. **Read first**: " in page
    assert "file system: ext4 on a disk" in page and "| 1.45 (2 / 2) |" in page
    numbers = json.loads((tmp_path / "run_checkpoint.json").read_text())
    assert numbers["runs"][0]["ranks"][0]["training"]["save_interval"] == 4


def test_numbers_are_kept_to_the_microsecond():
    assert rounded({"a": [1.23456789, (2, 0.1 + 0.2)], "b": "1.23456789"}) == {
        "a": [1.234568, [2, 0.3]],
        "b": "1.23456789",
    }


def test_bounds_leave_nothing_behind(tmp_path):
    result = measure_bounds(tmp_path, 3 << 20)
    assert set(result) == {"write", "read", "memcpy", "sha256"} and all(
        seconds > 0 for seconds in result.values()
    )
    assert not list(tmp_path.iterdir())


def test_a_case_knows_its_processes():
    assert RunCase("loop", "pp 2", {"hidden_size": 8}).num_processes == 2
