"""Tables and verdicts."""

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from lab.benchmarks.cases import KINDS, VOCABULARY, case_settings
from lab.benchmarks.flops import step_attention_flops, step_flops
from lab.benchmarks.measure import ShapeResult
from lab.benchmarks.pages import bullets, held, step_page_name, write_page
from megatron_sorted.platform.select import choose_platform
from megatron_sorted.reporting.markdown import commit, processor

TIME_BOUND = 1.10
"""Time over plain time x FLOP ratio that must hold."""
PLAIN_BOUND = 1.03
"""Time of ours without early exits over plain time that must hold."""
FLAT_BYTES = 16 * 1024 * 1024
"""Peaks this close count as equal: resident memory is not exact."""
PACKAGES = ("torch", "megatron-core")


def machine(device_name: str, threads: int) -> str:
    """Return the machine in words."""
    device = choose_platform(device_name)
    if device.name == "cpu":
        return f"{processor()}, {threads} thread(s) a process"
    import torch

    return torch.get_device_module(device.name).get_device_name()


def origin(
    device: str, threads: int, bf16: bool, packages: Sequence[str] = PACKAGES
) -> dict[str, str]:
    """Return what a page says of a measurement: when, from which commit, with what command, where and with which versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "command": shlex.join(["python", "-m", f"lab.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "device": choose_platform(device).name,
        "machine": machine(device, threads),
        "precision": "bf16" if bf16 else "fp32",
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }


def uses_cpu_seconds(options: argparse.Namespace) -> bool:
    """Return whether time means CPU time of the process: on CPU with one thread, where other programs share the cores."""
    return choose_platform(options.device).name == "cpu" and options.threads == 1


def table(result: ShapeResult, cpu: bool) -> list[dict]:
    """Return a row per case; time ratios are medians over rounds of the ratio within a round."""
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


def _line(row: dict) -> str:
    memory = (
        "- | -"
        if row["peak_bytes"] is None
        else f"{row['peak_bytes'] / 1e6:,.0f} | {row['peak_minus_plain_bytes'] / 1e6:+,.0f}"
    )
    return (
        f"| {row['kind']} | {row['exits']} | {row['seconds']:.2f} | {row['times_plain']:.2f} | {row['flop_ratio']:.2f} "
        f"| {row['over_bound']:.2f} | {row['wall_times_plain']:.2f} | {row['rounds']} | {memory} |"
    )


def _markdown(shape: str, rows: list[dict], facts: dict[str, str], cpu: bool) -> str:
    time_unit = "CPU s" if cpu else "s"
    head = f"early exits | {time_unit} a step | x plain | FLOP ratio | over bound | x plain (wall) | rounds | peak MB | - plain"
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
    return "\n".join(
        [
            f"# One training step, shape {shape}",
            "",
            f"8 layers, hidden 512, 8 heads, SwiGLU, tied head, vocabulary {VOCABULARY[shape]:,}, 2 x 512 tokens, Adam. All models have the",
            "same TransformerConfig, layer specification (torch's attention and norm kernels, or Transformer Engine's where installed),",
            "Megatron DDP and Megatron optimizer.",
            "",
            *bullets(facts),
            "",
            f"| model | {head} |",
            "|---" + "|---:" * 9 + "|",
            *(_line(row) for row in rows),
            "",
            *held(verdicts(rows)),
            "",
            *(f"- *{kind}*: {meaning}" for kind, meaning in KINDS.items()),
            f"- *x plain*: median over rounds of the ratio within a round; a round is one step of each model in turn. Time is {time}.",
            "- *FLOP ratio*: operations with all heads over those of the plain model, from the sizes (attention over the whole square).",
            "- *over bound*: x plain / FLOP ratio. Below 1 an exit costs less than the plain model's own head and layers do per operation.",
            f"- *peak*: largest memory during a step after one warm-up step, in a fresh process; {memory}.",
            "",
        ]
    )


def write_report(shape: str, result: ShapeResult, options: argparse.Namespace) -> str:
    """Return the report as text, after writing it and its numbers to files."""
    cpu = uses_cpu_seconds(options)
    rows = table(result, cpu)
    settings = case_settings(shape, result.rows[0].case, options.device, options.bf16)
    facts = {
        **origin(options.device, options.threads, options.bf16),
        "operations of the plain step": f"{step_flops(settings, 1) / 1e9:.1f} G from the sizes, attention's two products "
        f"{step_attention_flops(settings) / 1e9:.1f} G of them; torch.utils.flop_counter, which does not know every attention kernel, "
        f"counts {result.counted_flops / 1e9:.1f} G",
    }
    text = _markdown(shape, rows, facts, cpu)
    numbers = {
        **facts,
        "table": rows,
        "targets": verdicts(rows),
        "rounds": [asdict(row) for row in result.rows],
    }
    return write_page(options.output, step_page_name(f"step_{shape}", options), text, numbers)
