"""The numbers of a page, computed from the seconds of every step, save and load."""

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from lab.benchmarks.loop_time import SHARED, WORK
from lab.benchmarks.tally import REST

Steps = list[dict[str, Any]]
"""The result of ``loop_time.measure_loop``."""
Rounds = list[list[dict[str, Any]]]
"""One list for each round (or save), with one entry for each rank."""
Value = Callable[[dict[str, Any]], float]


def _mean_ms(values: Iterable[float]) -> float:
    values = list(values)
    return 1e3 * sum(values) / len(values) if values else 0.0


def overhead(seconds: dict[str, list[float]], clock: int) -> float:
    """Return a step's seconds outside forward, backward and optimizer.

    ``clock`` 0 is wall time, 1 is CPU time of the thread.
    """
    return sum(times[clock] for cause, times in seconds.items() if cause not in WORK)


def causes_of(steps: Steps) -> dict[str, dict[str, float]]:
    """Return {cause: {"wall": ms, "cpu": ms}}, means over steps; the work of any loop is first."""
    names = dict.fromkeys(
        [*WORK, *(name for step in steps for name in step["seconds"] if name != REST), REST]
    )
    return {
        name: {
            clock: _mean_ms(step["seconds"].get(name, (0.0, 0.0))[index] for step in steps)
            for index, clock in enumerate(("wall", "cpu"))
        }
        for name in names
    }


def waiting(ranks: list[Steps], rank: int) -> float:
    """Return how long a rank waits for others in the causes that they share, in ms a step.

    The rank that comes last to an exchange does not wait: its time is that of the exchange itself,
    and what the others need beyond is waiting.
    """
    return _mean_ms(
        sum(
            _wall(step, cause) - min(_wall(other[index], cause) for other in ranks)
            for cause in SHARED
        )
        for index, step in enumerate(ranks[rank])
    )


def _wall(step: dict[str, Any], cause: str) -> float:
    return step["seconds"].get(cause, (0.0, 0.0))[0]


def loop_row(ranks: list[Steps], interval: int) -> dict[str, Any]:
    """Return the overhead at one log interval, in ms a step and as a share of the step.

    It is that of the rank that has most of it without waiting.
    """
    chosen = [[step for step in steps if step["log_interval"] == interval] for steps in ranks]
    rows = []
    for rank, steps in enumerate(chosen):
        step_ms = _mean_ms(sum(wall for wall, _ in step["seconds"].values()) for step in steps)
        wall, cpu = (
            _mean_ms(overhead(step["seconds"], clock) for step in steps) for clock in (0, 1)
        )
        waits, causes = waiting(chosen, rank), causes_of(steps)
        rows.append(
            {
                "log_interval": interval,
                "rank": rank,
                "steps": len(steps),
                "step_ms": step_ms,
                "with_waits_ms": wall,
                "waits_ms": waits,
                "overhead_ms": wall - waits,
                "overhead_cpu_ms": cpu,
                "share": (wall - waits) / step_ms,
                "zeroing_ms": causes[WORK[1]]["wall"],
                "causes": causes,
            }
        )
    return max(rows, key=lambda row: row["overhead_ms"])


def cost_of_comparing(ranks: list[Steps]) -> dict[str, float]:
    """Return how much longer steps with a comparison of exits take in the schedule.

    The medians are over pairs of steps, one that compares and the one before it, both with log
    interval 2. Of the ranks, the one with the largest ratio counts.
    """
    largest = []
    for clock in (1, 0):  # CPU time of the thread, which other programs disturb least; wall time
        by_rank = []
        for steps in ranks:
            mine = {step["step"]: step for step in steps if step["log_interval"] == 2}
            pairs = [
                (mine[number - 1], step)
                for number, step in mine.items()
                if step["reported"] and number - 1 in mine
            ]
            times = [
                (_in_schedule(plain, clock), _in_schedule(compared, clock))
                for plain, compared in pairs
            ]
            by_rank.append(
                (
                    statistics.median(with_ / without for without, with_ in times),
                    1e3 * statistics.median(with_ - without for without, with_ in times),
                    len(times),
                )
            )
        largest.append(max(by_rank))
    (cpu, cpu_ms, pairs), (wall, wall_ms, _) = largest
    return {
        "cpu_ratio": cpu,
        "cpu_ms": cpu_ms,
        "wall_ratio": wall,
        "wall_ms": wall_ms,
        "pairs": pairs,
    }


def _in_schedule(step: dict[str, Any], clock: int) -> float:
    return step["seconds"][WORK[0]][clock]


def median_of(rounds: Rounds, value: Value) -> float:
    """Return the median over rounds of the largest value of any rank."""
    return statistics.median(max(value(rank) for rank in ranks) for ranks in rounds)


def ratio_of(rounds: Rounds, over: Value, under: Value) -> float:
    """Return the median over rounds of a ratio; each side is the largest of any rank."""
    return statistics.median(max(map(over, ranks)) / max(map(under, ranks)) for ranks in rounds)


def all_bounds(entry: dict[str, Any]) -> float:
    """Return the seconds of a verified save's parts: hash, write and flush, read back, hash."""
    bounds = entry["bounds"]
    return bounds["write"] + bounds["read"] + 2 * bounds["sha256"]


def load_bound(entry: dict[str, Any]) -> float:
    """Return the seconds of reading the files once and copying them into tensors."""
    return entry["bounds"]["read"] + entry["bounds"]["memcpy"]


def checkpoint_row(ranks: list[dict[str, Any]], parameters: int) -> dict[str, Any]:
    """Return the numbers of one case of ``checkpoint_time``; the slowest rank counts."""
    rounds = [list(entries) for entries in zip(*(rank["rounds"] for rank in ranks), strict=True)]
    num_bytes = ranks[0]["rounds"][0]["bytes"]
    training = [rank["training"] for rank in ranks]
    saves = [list(entries) for entries in zip(*(one["outcomes"] for one in training), strict=True)]
    row = {
        "parameters": parameters,
        "bytes": num_bytes,
        "bytes_a_parameter": num_bytes / parameters,
        "rounds": len(rounds),
    }
    for name in ("save", "save_unverified", "load", "load_unverified"):
        row[name] = median_of(rounds, lambda entry, name=name: entry[name])
    row |= {
        "background": median_of(saves, lambda save: save["seconds"]),
        "held_first": max(rank["first"]["held"] for rank in ranks),
        "stall_first": max(rank["first"]["stall"] for rank in ranks),
        "held": statistics.median(
            max(both) for both in zip(*(one["held"] for one in training), strict=True)
        ),
        "stall": median_of(saves, lambda save: save["stall"]),
    }
    row["bounds"] = {
        name: median_of(rounds, lambda entry, name=name: entry["bounds"][name])
        for name in rounds[0][0]["bounds"]
    }
    row |= {
        "save_over_write": ratio_of(
            rounds, lambda entry: entry["save"], lambda entry: entry["bounds"]["write"]
        ),
        "save_over_bounds": ratio_of(rounds, lambda entry: entry["save"], all_bounds),
        "unverified_over_write": ratio_of(
            rounds, lambda entry: entry["save_unverified"], lambda entry: entry["bounds"]["write"]
        ),
        "load_over_bound": ratio_of(rounds, lambda entry: entry["load_unverified"], load_bound),
        "core_first": max(entry["core"] for entry in rounds[0]),
    }
    row["held_over_memcpy"] = row["held"] / row["bounds"]["memcpy"]
    return row | _beside_core(rounds[1:]) | steps_beside_saves(training[0]["steps"])


def _beside_core(later: Rounds) -> dict[str, float | None]:
    """Return megatron-core's later saves, and ours over them; None where there was only one."""
    if not later:
        return dict.fromkeys(("core", "over_core", "unverified_over_core", "core_over_write"))
    return {
        "core": median_of(later, lambda entry: entry["core"]),
        "over_core": ratio_of(later, lambda entry: entry["save"], lambda entry: entry["core"]),
        "unverified_over_core": ratio_of(
            later, lambda entry: entry["save_unverified"], lambda entry: entry["core"]
        ),
        "core_over_write": ratio_of(
            later, lambda entry: entry["core"], lambda entry: entry["bounds"]["write"]
        ),
    }


def steps_beside_saves(steps: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the median step without a save and with one in the background, and their ratio."""
    quiet = [step["seconds"] for step in steps if step["saving"] is False]
    saving = [step["seconds"] for step in steps if step["saving"]]
    both = bool(quiet and saving)
    return {
        "quiet_steps": len(quiet),
        "saving_steps": len(saving),
        "quiet_step": statistics.median(quiet) if quiet else None,
        "saving_step": statistics.median(saving) if saving else None,
        "slowdown": statistics.median(saving) / statistics.median(quiet) if both else None,
    }
