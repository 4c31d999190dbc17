"""Measures what rules for exits cost: step time and peak memory of each over uniform training, in one run.

Writes docs/benchmarks/rules.md and .json. Steps are taken in turns, one of each rule a round; memory is taken in a fresh process each.
What is measured stands in lab/benchmarks/rule_cases.py: a row there is a row of the page.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import os
import statistics
import sys

from lab.benchmarks.pages import bullets, held, step_options, step_page_name, write_page
from lab.benchmarks.report import origin, uses_cpu_seconds
from lab.benchmarks.rule_cases import BASE, CASES, case_flops, rule_settings
from lab.benchmarks.rule_worker import answers, measure_peak, num_timed, time_in_turns
from lab.benchmarks.worker import returning_freed_memory
from megatron_sorted.reporting.markdown import table

SAME_FLOPS_BOUND, MORE_FLOPS_BOUND = 1.02, 1.05
"""Time over uniform time x FLOP ratio that must hold: for rules that add no operations worth counting, and for those that do."""


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = step_options(__doc__)
    parser.add_argument(
        "--rules",
        nargs="+",
        choices=[name for name in CASES if name != BASE],
        help="which rules; by default all",
    )
    parser.add_argument("--no-memory", action="store_true", help="times only")
    return parser.parse_args()


def measure(names: list[str], options: argparse.Namespace) -> list[dict]:
    """Return a row for each case; time ratios are medians over rounds of the ratio to the steps of the base around it."""
    where = (options.device, options.bf16, options.threads)
    with returning_freed_memory():
        peaks: dict[str, int | None] = dict.fromkeys(names)
        for name in [] if options.no_memory else names:
            print(f"\r\033[Kmemory: {name}", end="", file=sys.stderr, flush=True)
            [peaks[name]] = answers(measure_peak, 1, name, *where)
    times: dict[str, list[tuple[tuple[float, float], tuple[float, float]]]] = {
        name: [] for name in names
    }
    others = [name for name in names if name != BASE]
    for number, name, own, base in answers(
        time_in_turns, num_timed(others, options.rounds), BASE, others, *where, options.rounds
    ):
        print(
            f"\r\033[Kround {number + 1} of {options.rounds}: {name}",
            end="",
            file=sys.stderr,
            flush=True,
        )
        if number >= 0:
            times[name].append((own, base))
            times[BASE].append((base, base))
    print("\r\033[K", end="", file=sys.stderr)
    cpu = uses_cpu_seconds(options)
    flops = {name: case_flops(rule_settings(name, options.device, options.bf16)) for name in names}
    rows = []
    for name in names:

        def over_base(kind: bool, name: str = name) -> list[float]:
            return [own[kind] / base[kind] for own, base in times[name]]

        ratio, bound = statistics.median(over_base(cpu)), flops[name] / flops[BASE]
        rows.append(
            {
                "rule": name,
                "ratios": over_base(cpu),
                "seconds": statistics.median(own[cpu] for own, _ in times[name]),
                "times_uniform": ratio,
                "spread": (min(over_base(cpu)), max(over_base(cpu))),
                "flop_ratio": bound,
                "over_bound": ratio / bound,
                "wall_times_uniform": statistics.median(over_base(False)),
                "peak_bytes": peaks[name],
                "peak_minus_uniform_bytes": None
                if options.no_memory
                else peaks[name] - peaks[BASE],
                "settings": CASES[name],
            }
        )
    return rows


def together(rows: list[dict]) -> list[str]:
    """Return a line on all rules without operations of their own, whose single rows are noisier; none where there are too few."""
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
        f"- rules without operations of their own, all together: {mean:.3f} ± {error:.3f} x uniform time (mean and standard error of "
        f"{len(ratios)} steps)"
    ]


def verdicts(rows: list[dict]) -> dict[str, bool]:
    """Return the targets and whether they hold."""
    same = [row for row in rows if row["flop_ratio"] == 1.0 and row["rule"] != BASE]
    more = [row for row in rows if row["flop_ratio"] > 1.0]
    return {
        f"a rule without operations of its own takes at most {SAME_FLOPS_BOUND:.2f} x uniform time": all(
            row["over_bound"] <= SAME_FLOPS_BOUND for row in same
        ),
        f"distillation takes at most {MORE_FLOPS_BOUND:.2f} x (uniform time x FLOP ratio)": all(
            row["over_bound"] <= MORE_FLOPS_BOUND for row in more
        ),
    }


def page(rows: list[dict], facts: dict[str, str], cpu: bool) -> str:
    """Return the page."""
    unit = "CPU s" if cpu else "s"
    heads = [
        "rule",
        f"{unit} a step",
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
    return "\n".join(
        [
            "# What rules for exits cost",
            "",
            f"{settings.num_layers} layers, hidden {settings.hidden_size}, SwiGLU, tied head, vocabulary {settings.vocab_size:,}, exits "
            f"{', '.join(map(str, settings.exit_layer_nums))} and the last, {settings.seq_length} tokens, Adam. The head costs about as much",
            "against a layer as in models of a billion parameters (1.3 layers).",
            "",
            *bullets(facts),
            "",
            *table(heads, cells),
            *together(rows),
            *held(verdicts(rows)),
            "",
            "- *x uniform*: median over rounds of the ratio to the mean of the uniform steps before and after it; a round is one step of each "
            "rule in turn, in one process. Time is "
            + (
                "CPU time of the process, which other programs disturb least; wall time stands beside it."
                if cpu
                else "wall time."
            ),
            "- *FLOP ratio*: operations over those of uniform training, from the sizes: a taught exit needs a fourth product with the head, "
            "a teacher of its own its layers' forward.",
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
    print(
        write_page(
            options.output,
            step_page_name("rules", options),
            text,
            {**facts, "targets": verdicts(rows), "table": rows},
        )
    )


if __name__ == "__main__":
    run_main(main)
