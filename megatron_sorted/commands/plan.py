"""``megatron-sorted plan``: memory, time and messages of a run, and better layouts."""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sorted.commands.parser import Parser
from megatron_sorted.errors import SettingsError
from megatron_sorted.planning.devices import DEVICES, device_named
from megatron_sorted.planning.estimate import make_plan
from megatron_sorted.planning.launch import DEFAULT_DEVICES, is_of_kind, launch_line
from megatron_sorted.planning.page import plan_lines, search_lines
from megatron_sorted.planning.search import better_split, search
from megatron_sorted.planning.work import without_uncounted
from megatron_sorted.settings.exits import loss_chunk_tokens
from megatron_sorted.settings.flags import known_flags
from megatron_sorted.settings.load import load_settings, notes_on_file
from megatron_sorted.settings.rules import check_settings
from megatron_sorted.settings.run import Settings

if TYPE_CHECKING:  # torch is needed for a dry run alone
    from megatron_sorted.dry_run.ranks import DryRun

GB = 10**9

DESCRIPTION = """\
Estimate memory, time, messages and balance of stages of a run before it is queued; propose layouts;
try them without devices. Settings after the file override it, as in training."""


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of the command, and the remaining arguments: settings."""
    parser = Parser(
        "megatron-sorted plan",
        DESCRIPTION,
        "megatron-sorted plan examples/llama3_8b.yaml --search",
        usage="%(prog)s RUN.yaml [options] [settings]",
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="?", metavar="RUN.yaml", help="settings of the run")
    parser.add_argument(
        "--world-size",
        metavar="N",
        help="number of processes (default: the key world-size of the file)",
    )
    parser.add_argument(
        "--planned-device",
        metavar="NAME",
        help=f"{', '.join(DEVICES)} (default: the file's key planned-device)",
    )
    parser.add_argument(
        "--device-file",
        type=Path,
        metavar="FILE",
        help="JSON with fields of the device that differ from the table",
    )
    parser.add_argument(
        "--memory-gb", metavar="GB", help="memory of one rank (default: that of the device)"
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="propose layouts for this number of processes, the fastest first",
    )
    parser.add_argument(
        "--show",
        default="10",
        metavar="N",
        help="number of layouts to print (default: %(default)s)",
    )
    parser.add_argument(
        "--dry-run",
        nargs="+",
        metavar="RANK",
        help="ranks to build and step without devices, or all",
    )
    parser.add_argument(
        "--whole-step", action="store_true", help="with --dry-run: run all micro-batches of a step"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="measure this machine's CPU and write FILE for --device-file",
    )
    return parser.parse_some(arguments, known_flags())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan and return the exit status."""
    options, changes = parse_arguments(arguments)
    if options.calibrate:
        from megatron_sorted.dry_run.calibrate import calibrate

        print(calibrate(options.calibrate, len(os.sched_getaffinity(0))))
        return 0
    if options.run is None:
        raise SettingsError("no run. Give its YAML file: megatron-sorted plan RUN.yaml")
    start = time.monotonic()
    status = plan_run(options, changes)
    if options.search or options.dry_run:
        print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    return status


def plan_run(options: argparse.Namespace, changes: list[str]) -> int:
    """Plan a run, search and try layouts as requested, and print the results.

    Returns:
        The exit status: 0 if the run fits and a dry run found no difference from the plan.
    """
    settings = load_settings(["--config", options.run, *changes])
    world_size = _world_size(options, settings)
    check_settings(settings, world_size)
    settings, notes = without_uncounted(
        dataclasses.replace(settings, vocab_size=_vocabulary(settings))
    )
    name, device_notes = _device_name(options, settings)
    notes = [*notes_on_file(options.run), *notes, *device_notes]
    shown = _positive(options.show, "--show", int)
    device = device_named(name, options.device_file)
    limit = device.memory_bytes
    if options.memory_gb is not None:
        limit = int(_positive(options.memory_gb, "--memory-gb", float) * GB)
    ranks = _ranks(options.dry_run, settings, world_size) if options.dry_run else None
    chunk_tokens = loss_chunk_tokens(settings, on_cpu=not device.fused)
    sizes = settings.vocab_size, world_size
    plan = make_plan(settings, *sizes, device, chunk_tokens)
    if options.search:
        proposals, tried, least = search(
            settings, *sizes, device, chunk_tokens, limit, lambda count: _show(f"{count} layouts")
        )
        _show("")
    run: DryRun | None = None
    if options.dry_run:
        from megatron_sorted.dry_run.ranks import dry_run

        run = dry_run(settings, *sizes, plan, ranks, options.whole_step, _show)
        _show("")
    launch = _launch(options, settings, changes, world_size, device.per_host)
    if options.json:
        result = {
            "settings": changes,
            "device": name,
            "plan": _as_json(plan),
            "fits": plan.peak_bytes <= limit,
            "fits_surely": plan.needed_bytes <= limit,
            "notes": notes,
            "launch": launch,
        }
        if options.search:
            result["proposals"] = [
                {
                    "layout": _differences(proposal.settings, settings),
                    "seconds": proposal.plan.seconds,
                    "peak_bytes": proposal.plan.peak_bytes,
                }
                for proposal in proposals[:shown]
            ]
        if run:
            result["dry_run"] = {
                "ranks": len(run.ranks),
                "messages": run.messages,
                "problems": run.problems,
            }
        print(json.dumps(result, indent=1))
    else:
        better = better_split(settings, plan, device, chunk_tokens)
        lines = [*notes, *plan_lines(settings, plan, name, limit, launch, better)]
        if options.search:
            lines += ["", *search_lines(settings, proposals, tried, least, limit, shown)]
        if run:
            from megatron_sorted.dry_run.page import dry_run_lines

            lines += ["", *dry_run_lines(run)]
        print("\n".join(lines))
    return int(plan.peak_bytes > limit or bool(run and run.problems))


def _world_size(options: argparse.Namespace, settings: Settings) -> int:
    """Return the number of processes: of --world-size, the file, the environment, or 1."""
    sources = {
        "--world-size": options.world_size,
        "world-size": settings.world_size,
        "WORLD_SIZE": os.environ.get("WORLD_SIZE", "1"),
    }
    source, given = next((source, given) for source, given in sources.items() if given is not None)
    return _positive(str(given), source, int)


def _positive(text: str, source: str, kind: type) -> int | float:
    """Return a number above 0.

    Raises:
        SettingsError: The text is no such number.
    """
    try:
        number = kind(text)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        whole = "whole " if kind is int else ""
        raise SettingsError(
            f"{source}: {text} is not a {whole}number above 0. Give one, or leave it out."
        )
    return number


def _ranks(given: list[str], settings: Settings, world_size: int) -> list[int] | None:
    """Return the ranks of a dry run; None for all.

    Raises:
        SettingsError: One is no rank, or the run cannot be tried without devices.
    """
    if settings.data_parallel == "fsdp":
        raise SettingsError(
            "--dry-run: --data-parallel fsdp is torch's, which knows no device without values. "
            "Leave --dry-run out: the plan counts fsdp all the same."
        )
    if given == ["all"]:
        return None
    for rank in given:
        if not rank.isdecimal() or int(rank) >= world_size:
            raise SettingsError(
                f"--dry-run: {rank} is no rank of {world_size} processes. "
                f"Use 0..{world_size - 1}, or all, after the run's file."
            )
    return [int(rank) for rank in given]


def _device_name(options: argparse.Namespace, settings: Settings) -> tuple[str, list[str]]:
    """Return the name of the planned device, and a note if it is the default of the run's kind."""
    usual = DEFAULT_DEVICES[settings.device]
    if options.planned_device is not None:
        return options.planned_device, []
    name = settings.planned_device
    if name is not None and not is_of_kind(name, settings.device):
        return usual, [
            f"note: planned for {usual}: the file's planned-device {name} is not of --device "
            f"{settings.device}. --planned-device names another device"
        ]
    if name is not None:
        return name, []
    if settings.device == "cpu":
        return usual, []
    return usual, [
        f"note: planned for {usual}, since neither --planned-device nor the key planned-device of "
        f"{options.run} says what --device {settings.device} is"
    ]


def _vocabulary(settings: Settings) -> int:
    """Return the number of tokens: of --vocab-size, or of the tokenizer if its file exists.

    Raises:
        SettingsError: Neither is available.
    """
    if settings.vocab_size is not None:
        return settings.vocab_size
    path = settings.tokenizer_model
    if path is None or not os.path.exists(path):
        reason = f"the tokenizer {path} does not exist" if path else "no tokenizer is named"
        raise SettingsError(
            f"--vocab-size: not given, and {reason}. Give the number of its tokens: --vocab-size N."
        )
    from megatron_sorted.data.tokenizer import load_tokenizer

    return load_tokenizer(settings.tokenizer_type, path, None).vocab_size


def _launch(
    options: argparse.Namespace,
    settings: Settings,
    changes: list[str],
    world_size: int,
    per_host: int,
) -> str:
    """Return the command that starts the run, or what to change before there is one."""
    if world_size > per_host and world_size % per_host and settings.device != "cpu":
        return (
            f"no line to start it: {world_size} processes do not fill hosts of {per_host} devices. "
            "Change --world-size, or per_host in --device-file."
        )
    line = launch_line(settings, options.run, changes, world_size, per_host)
    if not line.startswith("torchrun ") and settings.world_size not in (None, world_size):
        return (
            f"with world-size: {world_size} in {options.run}, which says {settings.world_size}: "
            f"{line}"
        )
    return line


def _show(text: str) -> None:
    """Show progress in place on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _differences(settings: Settings, given: Settings) -> dict[str, object]:
    """Return the settings whose values differ from those of ``given``."""
    names = [field.name for field in dataclasses.fields(settings)]
    return {
        name: getattr(settings, name)
        for name in names
        if getattr(settings, name) != getattr(given, name)
    }


def _as_json(value: object) -> object:
    """Return a plan, or a part of it, as values of JSON."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        values = {field.name: _as_json(getattr(value, field.name)) for field in fields}
        return values | ({"total": value.total} if hasattr(value, "total") else {})
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    if isinstance(value, dict):
        return {key: _as_json(part) for key, part in value.items()}
    return value
