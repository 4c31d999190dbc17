"""``megatron-sorted plan``: memory, time and messages of a run before it is queued, and layouts that may be better."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.commands.parser import Parser
from megatron_sorted.errors import SettingsError
from megatron_sorted.planning.devices import DEVICES
from megatron_sorted.settings.flags import known_flags

DESCRIPTION = """\
Say what a run will take before it is queued: memory, time, messages, balance of its stages; propose
layouts; try them without devices. Settings after the file override it, as in training."""


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the command line's options, and the rest: settings."""
    parser = Parser(
        "megatron-sorted plan",
        DESCRIPTION,
        "megatron-sorted plan examples/llama3_8b.yaml --search",
        usage="%(prog)s RUN.yaml [options] [settings]",
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="?", metavar="RUN.yaml", help="the run")
    parser.add_argument(
        "--world-size", metavar="N", help="processes (default: the key world-size of the file)"
    )
    parser.add_argument(
        "--planned-device",
        metavar="NAME",
        help=f"{', '.join(DEVICES)} (default: the key planned-device of the file)",
    )
    parser.add_argument(
        "--device-file",
        type=Path,
        metavar="FILE",
        help="JSON with fields of the device that differ from the table",
    )
    parser.add_argument(
        "--memory-gb", metavar="GB", help="limit for one rank (default: the device's memory)"
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="propose layouts on as many processes, the fastest that fit first",
    )
    parser.add_argument("--show", default="10", metavar="N", help="how many of them (%(default)s)")
    parser.add_argument(
        "--dry-run",
        nargs="+",
        metavar="RANK",
        help="ranks to build and step without devices, or: all",
    )
    parser.add_argument(
        "--whole-step", action="store_true", help="with --dry-run: all micro-batches of a step"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="measure this machine's cores and write a --device-file",
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
    from megatron_sorted.dry_run.plan_run import plan_run

    start = time.monotonic()
    status = plan_run(options, changes)
    if options.search or options.dry_run:
        print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    return status
