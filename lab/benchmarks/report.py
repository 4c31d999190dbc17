"""The pages docs/benchmarks/step_A.md and step_B.md."""

import argparse
from dataclasses import asdict

from lab.benchmarks.cases import KINDS, SHAPES, case_settings
from lab.benchmarks.flops import step_attention_flops, step_flops
from lab.benchmarks.measure import ShapeResult
from lab.benchmarks.pages import (
    bullets,
    origin,
    step_page_name,
    uses_cpu_seconds,
    verdict_lines,
    write_page,
)
from lab.results.pages import page_head
from megatron_sorted.reporting.markdown import table

TIME_BOUND = 1.10
"""Time over plain time x FLOP ratio that must hold."""
PLAIN_BOUND = 1.03
"""Time of ours without early exits over plain time that must hold."""
FLAT_BYTES = 16 * 1024 * 1024
"""Peaks this close count as equal: resident memory is not exact."""


def rows_of(result: ShapeResult, cpu: bool) -> list[dict]:
    """Return a row for each case; time ratios are medians over rounds."""
    plain = result.rows[0]
    rows = []
    for row in result.rows:
        ratio, bound = row.times(plain, cpu), row.flops / plain.flops
        rows.append(
            {
                "kind": row.case.kind,
                "exits": row.case.num_exits,
                "seconds": row.seconds(cpu),
                "times_plain": ratio,
                "flop_ratio": bound,
                "over_bound": ratio / bound,
                "wall_times_plain": row.times(plain, cpu=False),
                "rounds": len(row.rounds),
                "peak_bytes": row.peak_bytes,
                "peak_minus_plain_bytes": None
                if row.peak_bytes is None
                else row.peak_bytes - plain.peak_bytes,
            }
        )
    return rows


def verdicts(rows: list[dict]) -> dict[str, bool]:
    """Return the targets and whether they hold."""
    ours = [row for row in rows if row["kind"] == "ours"]
    holds = {
        f"ours takes at most {TIME_BOUND:.2f} x (plain time x FLOP ratio)": all(
            row["over_bound"] <= TIME_BOUND for row in ours
        ),
        f"ours with 0 exits takes at most {PLAIN_BOUND:.2f} x plain time": all(
            row["times_plain"] <= PLAIN_BOUND for row in ours if row["exits"] == 0
        ),
    }
    peaks = [row["peak_bytes"] for row in ours]
    if None not in peaks:
        holds["ours needs no more memory than plain, with any number of exits"] = all(
            row["peak_minus_plain_bytes"] <= 0 for row in ours
        )
        holds["ours needs the same memory with any number of exits (within 16 MiB)"] = (
            max(peaks) - min(peaks) <= FLAT_BYTES
        )
    return holds


def _cells(row: dict) -> list[str]:
    memory = (("peak_bytes", ",.0f"), ("peak_minus_plain_bytes", "+,.0f"))
    ratios = ("seconds", "times_plain", "flop_ratio", "over_bound", "wall_times_plain")
    return [
        row["kind"],
        str(row["exits"]),
        *(f"{row[key]:.2f}" for key in ratios),
        str(row["rounds"]),
        *("-" if row[key] is None else f"{row[key] / 1e6:{form}}" for key, form in memory),
    ]


def _markdown(shape: str, rows: list[dict], facts: dict[str, str], cpu: bool) -> str:
    titles = [
        "model",
        "early exits",
        f"{'CPU s' if cpu else 's'} a step",
        "x plain",
        "FLOP ratio",
        "over bound",
        "x plain (wall)",
        "rounds",
        "peak MB",
        "- plain",
    ]
    time = (
        "CPU time of the process, which other programs disturb least; wall time stands beside it"
        if cpu
        else "wall time"
    )
    memory = (
        "as torch reports it"
        if facts["device"] != "cpu"
        else "resident memory of the whole process, freed blocks given back"
    )
    vocabulary, dominant = SHAPES[shape]
    return "\n".join(
        [
            *page_head(
                f"One training step, shape {shape}",
                f"time and memory of a training step beside megatron-core, where {dominant}"
                " dominate",
            ),
            "8 layers, hidden 512, 8 heads, SwiGLU, tied head, vocabulary"
            f" {vocabulary:,}, 2 x 512 tokens, Adam. All models have the same",
            "TransformerConfig, layer specification (torch's attention and norm kernels, or"
            " Transformer Engine's where installed),",
            "Megatron DDP and Megatron optimizer.",
            "",
            *bullets(facts),
            "",
            *table(titles, [_cells(row) for row in rows]),
            *verdict_lines(verdicts(rows)),
            "",
            *(f"- *{kind}*: {meaning}" for kind, meaning in KINDS.items()),
            "- *x plain*: median over rounds of the ratio within a round; a round is one step of"
            f" each model in turn. Time is {time}.",
            "- *FLOP ratio*: operations with all heads over those of the plain model, from the"
            " sizes (attention over the whole square).",
            "- *over bound*: x plain / FLOP ratio. Below 1 an exit costs less than the plain"
            " model's own head and layers do per operation.",
            "- *peak*: largest memory during a step after one warm-up step, in a fresh process;"
            f" {memory}.",
            "",
        ]
    )


def write_report(shape: str, result: ShapeResult, options: argparse.Namespace) -> str:
    """Write the report and its numbers; return the report."""
    cpu = uses_cpu_seconds(options)
    rows = rows_of(result, cpu)
    settings = case_settings(shape, result.rows[0].case, options.device, options.bf16)
    facts = {
        **origin(options.device, options.threads, options.bf16),
        "operations of the plain step": f"{step_flops(settings, 1) / 1e9:.1f} G from the sizes,"
        f" attention's two products {step_attention_flops(settings) / 1e9:.1f} G of them;"
        " torch.utils.flop_counter, which does not know every attention kernel,"
        f" counts {result.counted_flops / 1e9:.1f} G",
    }
    text = _markdown(shape, rows, facts, cpu)
    numbers = {
        **facts,
        "table": rows,
        "targets": verdicts(rows),
        "rounds": [asdict(row) for row in result.rows],
    }
    return write_page(options.output, step_page_name(f"step_{shape}", options), text, numbers)
