"""Compare plans with processes of this machine: memory, order of step times, balance with exits.

Writes docs/results/plan_measured.md. Memory is resident memory beyond what a process had before its
model. Times are taken in turns, one step of each layout in a round, and the least of each layout
counts: whatever else the machine does only makes a step longer.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import datetime
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from lab.benchmarks.layout_cases import (
    BALANCE,
    FOUR_EXITS,
    FOUR_STAGES,
    MEMORY,
    MEMORY_CASES,
    TIME,
    TIME_CASES,
)
from lab.benchmarks.layouts import MeasuredLayout
from lab.benchmarks.pages import command_line, machine
from lab.benchmarks.worker import RETURN_FREED_MEMORY
from lab.results.pages import page_head, show_progress
from megatron_sorted.dry_run.calibrate import calibrate
from megatron_sorted.files import write_text_atomically
from megatron_sorted.planning.devices import Device, device_named
from megatron_sorted.planning.estimate import make_plan
from megatron_sorted.planning.split import balanced_split, weights_of_layers, with_split
from megatron_sorted.reporting.markdown import commit, table
from megatron_sorted.settings.exits import CPU_CHUNK_TOKENS
from megatron_sorted.settings.rules import check_settings
from megatron_sorted.settings.run import Settings

MB = 1e6


def spearman(one: list[float], other: list[float]) -> float:
    """Return the rank correlation of two lists without ties: 1 - 6 sum d^2 / (n (n^2 - 1))."""

    def ranks(values: list[float]) -> list[int]:
        return [sorted(values).index(value) for value in values]

    count = len(one)
    squares = sum((a - b) ** 2 for a, b in zip(ranks(one), ranks(other), strict=True))
    return 1 - 6 * squares / (count * (count**2 - 1))


def memory_rows(device: Device, names: list[str]) -> list[dict]:
    """Return planned memory and that of the largest rank, for each stage of each layout."""
    rows = []
    for name in names:
        world_size, changes = MEMORY_CASES[name]
        settings = replace(MEMORY, **changes)
        check_settings(settings, world_size)
        show_progress(f"memory: {name}")
        layout = MeasuredLayout(settings, world_size, warm=True)
        layout.step()  # the optimizer creates its state
        peaks = [cost.peak_bytes for cost in layout.step()]
        layout.stop()
        plan = make_plan(settings, settings.vocab_size, world_size, device, CPU_CHUNK_TOKENS)
        per_stage = world_size // plan.pipeline_size
        for stage in plan.stages:
            measured = max(peaks[stage.stage * per_stage :][:per_stage])
            rows.append(
                {
                    "layout": name,
                    "stage": stage.stage,
                    "planned": stage.memory.total,
                    "measured": measured,
                    "states": stage.memory.states,
                }
            )
            show_progress(
                f"{name}, stage {stage.stage}: planned {stage.memory.total / MB:.0f} MB,"
                f" measured {measured / MB:.0f}",
                end="\n",
            )
    return rows


def time_rows(cases: dict[str, tuple[int, Settings]], device: Device, rounds: int) -> list[dict]:
    """Return planned and measured seconds of a step of each case."""
    layouts, times = {}, {name: [] for name in cases}
    for world_size, settings in cases.values():
        check_settings(settings, world_size)
    for name, (world_size, settings) in cases.items():
        show_progress(f"times: starting {name}")
        layouts[name] = MeasuredLayout(settings, world_size, warm=False)
        layouts[name].step()
    for number in range(rounds):
        for name, layout in layouts.items():
            show_progress(f"times: round {number + 1} of {rounds}, {name}")
            times[name].append(layout.step())
    for layout in layouts.values():
        layout.stop()
    rows = []
    for name, (world_size, settings) in cases.items():
        plan = make_plan(settings, settings.vocab_size, world_size, device, CPU_CHUNK_TOKENS)
        busy = [min(costs[rank].cpu_seconds for costs in times[name]) for rank in range(world_size)]
        rows.append(
            {
                "layout": name,
                "planned": plan.seconds,
                "measured": min(max(cost.seconds for cost in costs) for costs in times[name]),
                "busy": busy,
                "planned_busy": [stage.busy_seconds for stage in plan.stages],
                "imbalance": plan.imbalance,
            }
        )
    return rows


def balance_cases() -> dict[str, tuple[int, Settings]]:
    """Return models with layers in equal shares and as the plan splits them.

    There are three: early exits on two stages, an exit on each of four stages, none on four.
    """
    cases = {}
    for text, settings in (
        ("exits after 1, 2, 3 and 10", BALANCE),
        ("an exit on every stage", FOUR_EXITS),
        ("plain", FOUR_STAGES),
    ):
        stages = settings.pipeline_model_parallel_size
        equal = [settings.num_layers // stages] * stages
        for lengths in (
            equal,
            balanced_split(weights_of_layers(settings, settings.vocab_size), stages, 1),
        ):
            cases[f"{text}: {' '.join(map(str, lengths))}"] = (
                stages,
                with_split(settings, lengths),
            )
    return cases


def page(
    memory: list[dict], times: list[dict], balance: list[dict], device: Device, rounds: int
) -> str:
    """Return the page of results."""
    lines = [
        *page_head("Plans beside measurements", "how close plans of runs are to measurements"),
        f"{datetime.date.today()}, commit {commit()}, {machine('cpu', 1)},"
        f" load while it ran {os.getloadavg()[1]:.0f}. `{command_line()}`",
        "",
    ]
    if memory:
        worst = max(abs(row["planned"] / row["measured"] - 1) for row in memory)
        lines += [
            "## Memory of a step",
            "",
            f"Largest difference: {worst:.1%}. MB beyond what a process had before its "
            "model was built.",
            "",
        ]
        lines += table(
            ["layout", "stage", "planned", "of it states", "measured", "planned / measured"],
            [
                [
                    row["layout"],
                    str(row["stage"]),
                    *(f"{row[name] / MB:.0f}" for name in ("planned", "states", "measured")),
                    f"{row['planned'] / row['measured']:.3f}",
                ]
                for row in memory
            ],
        )
    if times:
        rho = spearman([row["planned"] for row in times], [row["measured"] for row in times])
        lines += [
            "## Order of step times",
            "",
            f"Spearman {rho:.3f}. Least of {rounds} rounds; one core, measured before them:"
            f" {device.single_flops / 1e9:.0f} GFLOP/s in fp32,"
            f" {device.memory_rate / 1e9:.1f} GB/s.",
            "",
        ]
        lines += table(
            ["layout", "planned s", "measured s", "measured / planned"],
            [
                [
                    row["layout"],
                    f"{row['planned']:.2f}",
                    f"{row['measured']:.2f}",
                    f"{row['measured'] / row['planned']:.2f}",
                ]
                for row in sorted(times, key=lambda row: row["planned"])
            ],
        )
    if balance:
        lines += [
            "## Exits weighed against layers",
            "",
            "Layers of each stage in equal shares, and as the plan splits them. CPU seconds "
            "of each process: stages share this machine's cores, so that a step's wall time is no "
            "measure of their balance.",
            "",
        ]
        lines += table(
            [
                "exits: layers of stages",
                "planned slowest / mean operations",
                "CPU s of stages",
                "slowest / mean",
                "step s",
            ],
            [
                [
                    row["layout"],
                    f"{row['imbalance']:.3f}",
                    ", ".join(f"{busy:.2f}" for busy in row["busy"]),
                    f"{max(row['busy']) * len(row['busy']) / sum(row['busy']):.3f}",
                    f"{row['measured']:.2f}",
                ]
                for row in balance
            ],
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ["memory", "times", "balance"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to measure")
    parser.add_argument(
        "--layouts",
        nargs="+",
        choices=list(MEMORY_CASES),
        default=list(MEMORY_CASES),
        help="layouts whose memory is measured",
    )
    parser.add_argument("--rounds", type=int, default=5, help="steps of each layout")
    page_of = Path("docs/results/plan_measured.md")
    parser.add_argument(
        "--output", type=Path, default=page_of, help="the page; numbers beside it as .json"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        calibrate(Path(folder, "cpu.json"), len(os.sched_getaffinity(0)))
        device = device_named("cpu", Path(folder, "cpu.json"))
    os.environ.update(RETURN_FREED_MEMORY)  # for the fork server, which the first process starts
    memory = memory_rows(device, options.layouts) if "memory" in options.parts else []
    times = balance = []
    if "times" in options.parts:
        cases = {
            name: (world_size, replace(TIME, **changes))
            for name, (world_size, changes) in TIME_CASES.items()
        }
        times = time_rows(cases, device, options.rounds)
    if "balance" in options.parts:
        balance = time_rows(balance_cases(), device, options.rounds)
    show_progress("")
    text = page(memory, times, balance, device, options.rounds)
    write_text_atomically(options.output, text)
    numbers = json.dumps({"memory": memory, "times": times, "balance": balance}, indent=1) + "\n"
    write_text_atomically(options.output.with_suffix(".json"), numbers)
    print(text)


if __name__ == "__main__":
    run_main(main)
