"""Tables and verdicts."""

import argparse
import datetime
import json
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from benchmark.cases import KINDS, VOCABULARY, case_settings
from benchmark.flops import step_attention_flops, step_flops
from benchmark.measure import ShapeResult
from megatron_sorted.files import write_text_atomically
from megatron_sorted.platform.select import choose_platform

TIME_BOUND = 1.10
"""Time over plain time x FLOP ratio that must hold."""
PLAIN_BOUND = 1.03
"""Time of ours without early exits over plain time that must hold."""
FLAT_BYTES = 16 * 1024 * 1024
"""Peaks this close count as equal: resident memory is not exact."""
PACKAGES = ("torch", "megatron-core")


def machine(device_name: str, threads: int) -> str:
    """Returns the machine in words."""
    device = choose_platform(device_name)
    if device.name == "cpu":
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")] \
            if Path("/proc/cpuinfo").exists() else [platform.processor()]
        return f"{names[0]}, {len(names)} cores, {threads} thread(s) a process"
    import torch

    return torch.get_device_module(device.name).get_device_name()


def commit() -> str:
    """Returns the commit, marked where files other than documents differ from it (an earlier shape's report is one)."""
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain", "--", ".", ":!docs"], capture_output=True, text=True, check=False)
    return (answer.stdout.strip() or "unknown (no git)") + ("-dirty" if changed.stdout.strip() else "")


def uses_cpu_seconds(options: argparse.Namespace) -> bool:
    """Returns whether time means CPU time of the process: on CPU with one thread, where other programs share the cores."""
    return choose_platform(options.device).name == "cpu" and options.threads == 1


def table(result: ShapeResult, cpu: bool) -> list[dict]:
    """Returns a row per case; time ratios are medians over rounds of the ratio within a round."""
    plain = result.rows[0]
    rows = []
    for row in result.rows:
        ratio, bound = row.times(plain, cpu), row.flops / plain.flops
        rows.append({
            "kind": row.case.kind, "exits": row.case.num_exits, "seconds": row.seconds(cpu), "times_plain": ratio, "flop_ratio": bound,
            "over_bound": ratio / bound, "wall_times_plain": row.times(plain, cpu=False), "rounds": len(row.rounds),
            "peak_bytes": row.peak_bytes, "peak_minus_plain_bytes": None if row.peak_bytes is None else row.peak_bytes - plain.peak_bytes})
    return rows


def verdicts(rows: list[dict]) -> dict[str, bool]:
    """Returns the targets and whether they hold."""
    ours = [row for row in rows if row["kind"] == "ours"]
    holds = {
        f"ours takes at most {TIME_BOUND:.2f} x (plain time x FLOP ratio)": all(row["over_bound"] <= TIME_BOUND for row in ours),
        f"ours with 0 exits takes at most {PLAIN_BOUND:.2f} x plain time":
            all(row["times_plain"] <= PLAIN_BOUND for row in ours if row["exits"] == 0),
    }
    peaks = [row["peak_bytes"] for row in ours]
    if None not in peaks:
        holds["ours needs no more memory than plain, with any number of exits"] = all(row["peak_minus_plain_bytes"] <= 0 for row in ours)
        holds["ours needs the same memory with any number of exits (within 16 MiB)"] = max(peaks) - min(peaks) <= FLAT_BYTES
    return holds


def _line(row: dict) -> str:
    memory = "- | -" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f} | {row['peak_minus_plain_bytes'] / 1e6:+,.0f}"
    return (f"| {row['kind']} | {row['exits']} | {row['seconds']:.2f} | {row['times_plain']:.2f} | {row['flop_ratio']:.2f} "
            f"| {row['over_bound']:.2f} | {row['wall_times_plain']:.2f} | {row['rounds']} | {memory} |")


def _markdown(shape: str, rows: list[dict], facts: dict[str, str], cpu: bool) -> str:
    time_unit = "CPU s" if cpu else "s"
    head = f"early exits | {time_unit} a step | x plain | FLOP ratio | over bound | x plain (wall) | rounds | peak MB | - plain"
    time = "CPU time of the process, which other programs disturb least; wall time stands beside it" if cpu else "wall time"
    memory = "as torch reports it" if facts["device"] != "cpu" else "resident memory of the whole process, freed blocks given back"
    return "\n".join([
        f"# One training step, shape {shape}", "",
        f"8 layers, hidden 512, 8 heads, SwiGLU, tied head, vocabulary {VOCABULARY[shape]:,}, 2 x 512 tokens, Adam. All models have the",
        "same TransformerConfig, layer specification (torch's attention and norm kernels, or Transformer Engine's where installed),",
        "Megatron DDP and Megatron optimizer.", "",
        *(f"- {name}: {value}" for name, value in facts.items()), "",
        f"| model | {head} |", "|---" + "|---:" * 9 + "|", *(_line(row) for row in rows), "",
        *(f"- {'holds' if holds else 'DOES NOT HOLD'}: {target}" for target, holds in verdicts(rows).items()), "",
        *(f"- *{kind}*: {meaning}" for kind, meaning in KINDS.items()),
        f"- *x plain*: median over rounds of the ratio within a round; a round is one step of each model in turn. Time is {time}.",
        "- *FLOP ratio*: operations with all heads over those of the plain model, from the sizes (attention over the whole square).",
        "- *over bound*: x plain / FLOP ratio. Below 1 an exit costs less than the plain model's own head and layers do per operation.",
        f"- *peak*: largest memory during a step after one warm-up step, in a fresh process; {memory}.", ""])


def write_report(shape: str, result: ShapeResult, options: argparse.Namespace, command: str) -> str:
    """Returns the report as text, after writing it and its numbers to files."""
    cpu = uses_cpu_seconds(options)
    rows = table(result, cpu)
    settings = case_settings(shape, result.rows[0].case, options.device, options.bf16)
    facts = {
        "date": datetime.date.today().isoformat(), "commit": commit(), "command": command, "device": choose_platform(options.device).name,
        "machine": machine(options.device, options.threads), "precision": "bf16" if options.bf16 else "fp32",
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "operations of the plain step": f"{step_flops(settings, 1) / 1e9:.1f} G from the sizes, attention's two products "
            f"{step_attention_flops(settings) / 1e9:.1f} G of them; torch.utils.flop_counter, which does not know every attention kernel, "
            f"counts {result.counted_flops / 1e9:.1f} G",
    }
    text = _markdown(shape, rows, facts, cpu)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step_{shape}" + ("" if facts["device"] == "cpu" else f"_{facts['device']}") + ("_bf16" if options.bf16 else "")
    write_text_atomically(folder / f"{name}.md", text)
    numbers = {**facts, "table": rows, "targets": verdicts(rows), "rounds": [asdict(row) for row in result.rows]}
    write_text_atomically(folder / f"{name}.json", json.dumps(numbers, indent=1) + "\n")
    return text
