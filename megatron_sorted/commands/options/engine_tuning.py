"""What ``tune --engine vllm`` does: vLLM's steps are measured, drafts are scheduled by load."""

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from megatron_sorted.commands.options.engine import thread_variables
from megatron_sorted.decoding.tuning.tuned_options import (
    TUNED_FILE,
    read_tuned_options,
    write_draft_schedule,
)
from megatron_sorted.errors import DataError, SettingsError
from megatron_sorted.reading.shown import shown

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Numbers of drafted tokens that are measured, up to the longest one that is requested."""
MAX_LENGTH, MAX_TEXTS = 16, 1024


def add_engine_tuning_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of ``tune --engine vllm``, which have no effect without it."""
    group.add_argument(
        "--exit-layer", type=int, metavar="N", help="exit that drafts (default: the tuned one)"
    )
    group.add_argument(
        "--num-draft-tokens", type=int, metavar="N", help="longest draft to try (default: 6)"
    )
    group.add_argument(
        "--max-num-seqs", type=int, metavar="N", help="texts at once to measure (default: 32)"
    )


def check_engine_tuning(values: argparse.Namespace) -> None:
    """Check the options of ``tune --engine vllm`` and set their defaults.

    Raises:
        SettingsError: One is out of range, or given without another engine.
    """
    for name, default, most in (
        ("num_draft_tokens", 6, MAX_LENGTH),
        ("max_num_seqs", 32, MAX_TEXTS),
    ):
        value, option = getattr(values, name), f"--{name.replace('_', '-')}"
        if value is None:
            setattr(values, name, default)
        elif values.engine == "own":
            raise SettingsError(f"{option}: it has no effect without --engine. Leave it out.")
        elif not 1 <= value <= most:
            raise SettingsError(f"{option}: {value} is not in 1..{most}. Change it.")
    if values.exit_layer is not None and values.engine == "own":
        raise SettingsError("--exit-layer: it has no effect without --engine. Leave it out.")


def tune_drafts(values: argparse.Namespace, own: Sequence[str], path: Path) -> None:
    """Measure vLLM's steps, choose how many tokens an exit drafts at each load, and write it.

    Args:
        values: The options.
        own: vLLM's own options, with which it will serve.
        path: The file to write.

    Raises:
        SortedError: Something is missing, or the model or an option cannot work.
    """
    from megatron_sorted.serving.vllm.draft_schedule import (
        batch_sizes,
        draft_schedule,
        schedule_lines,
    )
    from megatron_sorted.serving.vllm.installed import installed_vllm
    from megatron_sorted.serving.vllm.launching import check_own
    from megatron_sorted.serving.vllm.options import (
        EngineOptions,
        command_line,
        engine_arguments,
        environment,
    )

    depth = drafting_exit(values.model, values.exit_layer)
    longest, most = values.num_draft_tokens, values.max_num_seqs
    options = EngineOptions(
        "self_speculative", (depth,), num_draft_tokens=longest, draft_schedule=((1, most, longest),)
    )
    arguments = engine_arguments(values.model, options)
    check_own(own, arguments)
    acceptance = acceptance_of(values.model, depth)
    installed = installed_vllm()
    if note := installed.check_version():
        print(f"note: {note}", file=sys.stderr)
    installed.check_device()
    # the scheduler is in this process, where its number of draft tokens can be set
    os.environ.update(environment(options), VLLM_ENABLE_V1_MULTIPROCESSING="0")
    os.environ.update(thread_variables(values.threads, installed.is_for_cpus))
    from megatron_sorted.serving.vllm.step_costs import StepClock

    lengths = sorted({length for length in LENGTHS if length < longest} | {longest})
    line = ["--model", *command_line(arguments), "--max-num-seqs", str(most)]
    clock = StepClock([*line, "--no-async-scheduling", *own], lengths)
    try:
        costs = clock.measure(batch_sizes(most), lambda line: print(line, flush=True))
    finally:
        clock.close()
    schedule = draft_schedule(costs, acceptance)
    measured = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": installed.version,
        "options": list(own),
        "context": clock.context,
        "acceptance": acceptance,
        "schedule": [list(row) for row in schedule],
        "steps": costs.rows(),
    }
    write_draft_schedule(path, "vllm", depth, measured)
    print(f"\nexit {depth}, whose next token is the full model's in {acceptance:.1%} of places:")
    print("\n".join(schedule_lines(costs, acceptance, schedule)))
    print(f"written: {path}")


def drafting_exit(model: Path, requested: int | None) -> int:
    """Return the exit that drafts: the requested one, else the tuned one.

    Raises:
        SettingsError: decoding.json names none.
    """
    path = model / TUNED_FILE
    tuned = read_tuned_options(path).get("strategies", {}).get("self_speculative", {})
    depth = requested if requested is not None else tuned.get("depth")
    if depth is None:
        raise SettingsError(
            f"{shown(path)}: it names no exit that drafts. Give --exit-layer, or tune the model "
            f"first: megatron-sorted tune {shown(model)} --prompt-file FILE."
        )
    return depth


def acceptance_of(model: Path, depth: int) -> float:
    """Return the share of the full model's tokens that an exit would choose, by decoding.json.

    It is taken for the probability that a drafted token is accepted.

    Raises:
        DataError: It was not measured.
    """
    path = model / TUNED_FILE
    share = read_tuned_options(path).get("agreement", {}).get(str(depth))
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share <= 1:
        raise DataError(
            f"{shown(path)}: it has no share of tokens that exit {depth} has in common with the "
            f"full model. Measure it first, where megatron_sorted[convert] is installed: "
            f"megatron-sorted tune {shown(model)} --prompt-file FILE."
        )
    return float(share)
