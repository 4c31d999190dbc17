"""``megatron-sorted doctor``: checks of a machine or a job; status 1 if one fails.

The command runs also where torch or megatron-core are missing or broken.
"""

import argparse
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sorted.commands.parser import Parser
from megatron_sorted.doctor.devices.names import DEVICES
from megatron_sorted.doctor.finding import FAIL, Finding, worst
from megatron_sorted.doctor.local import DoctorOptions, check_host
from megatron_sorted.doctor.table import as_data, as_text
from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.processes import World, read_world

NARROWEST, WIDEST = 80, 160
DESCRIPTION = """\
Check what this machine, or all nodes of a job, can do: OK, WARN (slow, unsafe or soon to fail) or
FAIL, with a remedy. For --network, start one process on every device, by torchrun, or by srun with
MASTER_ADDR and MASTER_PORT."""


def read_arguments(
    arguments: Sequence[str] | None, environment: Mapping[str, str]
) -> tuple[argparse.Namespace, World]:
    """Return the values of the options and the job that this process is part of.

    A mistake in either ends the process with status 2.
    """
    parser = Parser(
        "megatron-sorted doctor",
        DESCRIPTION,
        "torchrun --nproc-per-node 8 -m megatron_sorted doctor RUN.yaml --network",
    )
    parser.add_argument(
        "run", nargs="?", type=Path, metavar="RUN.yaml", help="settings of a run, to check too"
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        metavar="NAME",
        help=f"device to use: {', '.join(DEVICES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="number of processes of the run (default: those of the job)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="folder to test the disk (default: --save of the run, else the current)",
    )
    parser.add_argument(
        "--network",
        action=argparse.BooleanOptionalAction,
        help="test communication (default: in a job)",
    )
    parser.add_argument(
        "--limit-seconds",
        type=float,
        default=120.0,
        metavar="S",
        help="longest time to wait for another process (default: %(default)s)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the library that decodes on CPUs, and try it",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    values = parser.parse_args(arguments)
    try:
        world = read_world(environment)
    except PlatformError as error:
        parser.error(f"the environment of this job: {error}")
    if values.run is not None and not values.run.is_file():
        parser.error(f"{values.run}: no such file. Give the YAML file of a run.")
    if values.network is None:
        values.network = world.size > 1
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if values.network and world.size < 2:
        parser.error(
            "--network: this is one process. Start one on every device: "
            "torchrun ... -m megatron_sorted doctor --network."
        )
    if values.network and missing:
        parser.error(
            f"--network: {' and '.join(missing)} unset. Export the first node's name and a free "
            "port, the same on all nodes."
        )
    if values.network and values.limit_seconds <= 0:
        parser.error(f"--limit-seconds: {values.limit_seconds} is not above 0.")
    return values, world


def show(
    by_host: Mapping[str, Sequence[Finding]],
    figures: Sequence[Mapping[str, Any]],
    values: argparse.Namespace,
) -> int:
    """Print the findings and return the exit status."""
    if values.json:
        print(json.dumps(as_data(by_host, figures), indent=1), flush=True)
    else:
        width = min(WIDEST, max(NARROWEST, shutil.get_terminal_size((WIDEST, 24)).columns))
        print(as_text(by_host, width), flush=True)
    return int(worst(finding for findings in by_host.values() for finding in findings) == FAIL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check this machine or a job and return the exit status."""
    environment = dict(os.environ)
    values, world = read_arguments(arguments, environment)
    options = DoctorOptions(
        environment,
        world,
        values.device,
        values.run,
        values.folder,
        values.world_size,
        values.compile,
    )
    if values.network:
        from megatron_sorted.doctor.network.job import diagnose_job

        return diagnose_job(
            options, values.limit_seconds, lambda by_host, figures: show(by_host, figures, values)
        )
    if world.local_rank > 0:
        return 0
    return show({os.uname().nodename: check_host(options)}, (), values)
