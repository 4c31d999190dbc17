"""Measure step time and peak memory of each rule for exits, over those of uniform training.

Writes docs/benchmarks/rules.md and .json. Steps are taken in turns, one of each rule in a round,
all in one process; memory is taken in a fresh process for each rule. A row of
lab/benchmarks/rule_cases.py is a row of the page.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import os
import statistics

from lab.benchmarks.pages import (
    bullets,
    origin,
    step_options,
    step_page_name,
    uses_cpu_seconds,
    verdict_lines,
    write_page,
)
from lab.benchmarks.rule_cases import BASE, CASES, case_flops, rule_settings
from lab.benchmarks.rule_worker import serve_rules
from lab.benchmarks.worker import Worker, returning_freed_memory
from lab.results.pages import page_head, show_progress
from megatron_sorted.reporting.markdown import table

SAME_FLOPS_BOUND, MORE_FLOPS_BOUND = 1.02, 1.05
"""Time over uniform time x FLOP ratio that must hold: without and with operations of its own."""
Times = tuple[float, float]
"""Wall seconds and CPU seconds."""


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = step_options(__doc__)
    parser.add_argument(
        "--rules",
        nargs="+",
        choices=[name for name in CASES if name != BASE],
        help="which rules; by default all",
    )
    parser.add_argument("--no-memory", action="store_true", help="times only")
    return parser.parse_args()


def measure_peaks(names: list[str], options: argparse.Namespace) -> dict[str, int]:
    """Return the peak memory of the second step of each case, in bytes."""
    peaks = {}
    with returning_freed_memory():
        for name in names:
            show_progress(f"memory: {name}")
            worker = _start([name], options)
            peaks[name] = worker.step(name).peak_bytes
            worker.stop()
    return peaks


def measure_times(names: list[str], options: argparse.Namespace) -> dict[str, list[tuple]]:
    """Return {case: [(its times, the base's times)]}, one entry for each round.

    A shared machine is slower in one second than in another, so each case is compared with the
    mean of the two steps of the base before and after it.
    """
    worker = _start(names, options)
    times: dict[str, list[tuple[Times, Times]]] = {name: [] for name in names}
    for number in range(options.rounds):
        before = worker.step(BASE)[:2]
        for name in [name for name in names if name != BASE]:
            show_progress(f"round {number + 1} of {options.rounds}: {name}")
            own, after = worker.step(name)[:2], worker.step(BASE)[:2]
            base = tuple((one + other) / 2 for one, other in zip(before, after, strict=True))
            times[name].append((own, base))
            times[BASE].append((base, base))
            before = after
    worker.stop()
    show_progress("")
    return times


def _start(names: list[str], options: argparse.Namespace) -> Worker:
    worker = Worker(names[0], serve_rules, names, options.device, options.bf16, options.threads)
    worker.answer()
    return worker


def measure(names: list[str], options: argparse.Namespace) -> list[dict]:
    """Return a row for each case; time ratios are medians over rounds."""
    peaks = dict.fromkeys(names) if options.no_memory else measure_peaks(names, options)
    times, cpu = measure_times(names, options), uses_cpu_seconds(options)
    flops = {name: case_flops(rule_settings(name, options.device, options.bf16)) for name in names}
    rows = []
    for name in names:
        ratios, wall_ratios = (
            [own[clock] / base[clock] for own, base in times[name]] for clock in (cpu, False)
        )
        ratio, bound = statistics.median(ratios), flops[name] / flops[BASE]
        rows.append(
            {
                "rule": name,
                "ratios": ratios,
                "seconds": statistics.median(own[cpu] for own, _ in times[name]),
                "times_uniform": ratio,
                "spread": (min(ratios), max(ratios)),
                "flop_ratio": bound,
                "over_bound": ratio / bound,
                "wall_times_uniform": statistics.median(wall_ratios),
                "peak_bytes": peaks[name],
                "peak_minus_uniform_bytes": None
                if options.no_memory
                else peaks[name] - peaks[BASE],
                "settings": CASES[name],
            }
        )
    return rows


def together(rows: list[dict]) -> list[str]:
    """Return a line on all rules without operations of their own; none with too few steps.

    A single rule's row is noisier than all of them together.
    """
    ratios = [
        ratio
        for row in rows
        if row["flop_ratio"] == 1.0 and row["rule"] != BASE
        for ratio in row["ratios"]
    ]
    if len(ratios) < 2:
        return []
    mean, error = statistics.fmean(ratios), statistics.stdev(ratios) / len(ratios) ** 0.5
    return [
        f"- rules without operations of their own, all together: {mean:.3f} ± {error:.3f} x"
        f" uniform time (mean and standard error of {len(ratios)} steps)"
    ]


def verdicts(rows: list[dict]) -> dict[str, bool]:
    """Return the targets and whether they hold."""
    same = [row for row in rows if row["flop_ratio"] == 1.0 and row["rule"] != BASE]
    more = [row for row in rows if row["flop_ratio"] > 1.0]
    return {
        "a rule without operations of its own takes at most"
        f" {SAME_FLOPS_BOUND:.2f} x uniform time": all(
            row["over_bound"] <= SAME_FLOPS_BOUND for row in same
        ),
        f"distillation takes at most {MORE_FLOPS_BOUND:.2f} x (uniform time x FLOP ratio)": all(
            row["over_bound"] <= MORE_FLOPS_BOUND for row in more
        ),
    }


def page(rows: list[dict], facts: dict[str, str], cpu: bool) -> str:
    """Return the page."""
    titles = [
        "rule",
        f"{'CPU s' if cpu else 's'} a step",
        "x uniform",
        "lowest to highest",
        "FLOP ratio",
        "over bound",
        "x uniform (wall)",
        "peak MB",
        "- uniform",
    ]
    cells = [
        [
            row["rule"],
            f"{row['seconds']:.2f}",
            f"{row['times_uniform']:.3f}",
            "{:.3f} to {:.3f}".format(*row["spread"]),
            f"{row['flop_ratio']:.3f}",
            f"{row['over_bound']:.3f}",
            f"{row['wall_times_uniform']:.3f}",
            *(
                "-" if row[key] is None else f"{row[key] / 1e6:{form}}"
                for key, form in (("peak_bytes", ",.0f"), ("peak_minus_uniform_bytes", "+,.0f"))
            ),
        ]
        for row in rows
    ]
    settings = rule_settings(BASE, "cpu", False)
    time = (
        "CPU time of the process, which other programs disturb least; wall time stands beside it"
        if cpu
        else "wall time"
    )
    return "\n".join(
        [
            *page_head("What rules for exits cost", "what rules for exits cost"),
            f"{settings.num_layers} layers, hidden {settings.hidden_size}, SwiGLU, tied head,"
            f" vocabulary {settings.vocab_size:,}, exits"
            f" {', '.join(map(str, settings.exit_layer_nums))} and the last,"
            f" {settings.seq_length} tokens, Adam. The head costs about as much",
            "against a layer as in models of a billion parameters (1.3 layers).",
            "",
            *bullets(facts),
            "",
            *table(titles, cells),
            *together(rows),
            *verdict_lines(verdicts(rows)),
            "",
            "- *x uniform*: median over rounds of the ratio to the mean of the uniform steps before"
            " and after it; a round is one step of each rule in turn, in one process. Time is"
            f" {time}.",
            "- *FLOP ratio*: operations over those of uniform training, from the sizes: a taught"
            " exit needs a fourth product with the head, a teacher of its own its layers' forward.",
            "- *over bound*: x uniform / FLOP ratio.",
            "- *peak*: largest memory during a step after one warm-up step, in a fresh process.",
            "",
        ]
    )


def main() -> None:
    """Run the benchmark."""
    options = parse_arguments()
    rows = measure([BASE, *(options.rules or [name for name in CASES if name != BASE])], options)
    facts = {
        **origin(options.device, options.threads, options.bf16),
        "rounds": str(options.rounds),
        "load of the machine": f"{os.getloadavg()[1]:.1f} (5-minute mean)",
    }
    text = page(rows, facts, uses_cpu_seconds(options))
    numbers = {**facts, "targets": verdicts(rows), "table": rows}
    print(write_page(options.output, step_page_name("rules", options), text, numbers))


if __name__ == "__main__":
    run_main(main)
