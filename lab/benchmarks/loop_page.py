"""The page docs/benchmarks/run_loop.md."""

from pathlib import Path
from typing import Any

from lab.benchmarks.jobs import CaseResult, load_of
from lab.benchmarks.loop_time import CAUSES, SHARED, WORK
from lab.benchmarks.pages import bullets, origin, verdict_lines, write_page
from lab.benchmarks.run_numbers import cost_of_comparing, loop_row
from lab.benchmarks.tally import REST
from lab.results.pages import page_head
from megatron_sorted.reporting.markdown import table

OVERHEAD_BOUND = 0.02
"""Share of a step of one second that the loop may take outside forward, backward and optimizer."""
REPORTED_INTERVALS = (1, 10)
TERMS = f"""\
- *overhead*: the step minus the schedule (reduction of gradients is in it), minus the optimizer,
  minus setting gradients to zero, minus waits; mean over steps, of the rank that has most. *CPU*:
  the part of it in which the thread worked.
- *waits*: waiting for a slower rank where ranks exchange data between two steps
  ({", ".join(SHARED)}): what a rank needs there beyond the rank that comes last. It would wait as
  long in the next step's first message.
- *strictest*: overhead with the waits, with setting gradients to zero, and with the comparison of
  exits inside the schedule counted too.
- *{WORK[1]}*: Megatron's gradient buffers, once a step as in any Megatron loop: a memory write of
  4 bytes a parameter.
- *{REST}*: everything between the others.
"""
READING = """\
## Reading

Where more processes want to run than there are cores, the wall columns hold the time in which
others had the core, and the CPU columns state what the loop itself did. Only the comparison of
exits grows with the model: an argmax over the vocabulary for every exit and token, in steps that
report. Data, sums and reports depend on the numbers of samples, exits and ranks alone, so on a
larger model or a faster device they stay at the same milliseconds. A report costs its two small
all-reduces and one flushed line of each writer.
"""


def verdicts(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Return the target of each row (``loop_row`` with its layout) and whether it holds."""
    return {
        f"{row['layout']}, a report every {row['log_interval']}:"
        f" at most {OVERHEAD_BOUND:.0%} of a step of 1 s": (
            row["overhead_ms"] <= 1e3 * OVERHEAD_BOUND
        )
        for row in rows
    }


def _row(result: CaseResult, interval: int) -> dict[str, Any]:
    row, comparing = loop_row(result.ranks, interval), cost_of_comparing(result.ranks)
    strictest = row["with_waits_ms"] + row["zeroing_ms"] + max(comparing["cpu_ms"], 0.0) / interval
    return {"layout": result.case.layout, **row, "strictest_ms": strictest}


def write_loop_page(results: list[CaseResult], folder: Path) -> str:
    """Write the page on the loop's overhead and its numbers; return the page."""
    facts = {**origin("cpu", 1, bf16=False), **load_of(results)}
    rows = [_row(result, interval) for result in results for interval in REPORTED_INTERVALS]
    comparing = [
        {"layout": result.case.layout, **cost_of_comparing(result.ranks)} for result in results
    ]
    settings = results[0].case.settings

    def cause(name: str) -> list[str]:
        cells = [row["causes"].get(name, {"wall": 0.0, "cpu": 0.0}) for row in rows]
        return [name, *(f"{cell['wall']:.2f} ({cell['cpu']:.2f})" for cell in cells)]

    lines = [
        *page_head(
            "The loop's overhead outside forward, backward and optimizer",
            "what the training loop costs beside its steps",
        ),
        "Real runs of the training loop on gloo, one thread a process:"
        f" {settings['num_layers']} layers, hidden {settings['hidden_size']},"
        f" vocabulary {settings['vocab_size']:,},",
        f"exits at {', '.join(map(str, settings['exit_layer_nums']))} and the last layer,"
        f" samples of {settings['seq_length']} tokens packed from documents. JSON lines and"
        " TensorBoard are written.",
        "The functions that the loop calls are timed from outside; the loop itself is unchanged.",
        "",
        *bullets(facts),
        "",
        *table(
            [
                "layout",
                "a report every",
                "ms a step",
                "overhead, ms",
                "CPU, ms",
                "share of the step",
                "share of 1 s",
                "waits, ms",
                "strictest, share of 1 s",
                "steps",
            ],
            [
                [
                    row["layout"],
                    str(row["log_interval"]),
                    f"{row['step_ms']:,.0f}",
                    f"{row['overhead_ms']:.2f}",
                    f"{row['overhead_cpu_ms']:.2f}",
                    f"{row['share']:.2%}",
                    f"{row['overhead_ms'] / 1e3:.2%}",
                    f"{row['waits_ms']:.2f}",
                    f"{row['strictest_ms'] / 1e3:.2%}",
                    str(row["steps"]),
                ]
                for row in rows
            ],
        ),
        *verdict_lines(verdicts(rows)),
        "",
        "Means of each cause, ms a step on the wall, and in brackets CPU time of the thread:",
        "",
        *table(
            ["cause", *(f"{row['layout']}, every {row['log_interval']}" for row in rows)],
            [
                *map(cause, [*CAUSES, REST]),
                ["*not overhead:*", *("" for _ in rows)],
                *map(cause, WORK),
            ],
        ),
        "Exits are compared with the last one in steps that report, inside the schedule. Steps with"
        " and without it in turns:",
        "",
        *table(
            ["layout", "CPU ms longer", "CPU ratio", "wall ratio", "pairs of steps"],
            [
                [
                    row["layout"],
                    f"{row['cpu_ms']:+.1f}",
                    f"{row['cpu_ratio']:.3f}",
                    f"{row['wall_ratio']:.3f}",
                    str(row["pairs"]),
                ]
                for row in comparing
            ],
        ),
        *(f"- *{name}*: {meaning}." for name, meaning in CAUSES.items()),
        TERMS,
        READING,
    ]
    numbers = {**facts, "rows": rows, "comparing": comparing, "targets": verdicts(rows)}
    numbers["runs"] = [result.as_dict() for result in results]
    return write_page(folder, "run_loop", "\n".join(lines), numbers)
