"""``megatron-sorted doctor``: runs where torch or megatron-core are missing or broken; status 1 if something fails."""

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
from megatron_sorted.doctor.local import DoctorOptions, look_around
from megatron_sorted.doctor.table import as_data, as_text
from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.processes import World, read_world

NARROWEST, WIDEST = 80, 160
DESCRIPTION = """\
Say what this machine, or all nodes of a job, will do and what not: OK, WARN (slowly, unsafely or not
for long) or FAIL, with a remedy. With --network, one process on every device: torchrun, or srun with
MASTER_ADDR and MASTER_PORT."""


def read_arguments(
    arguments: Sequence[str] | None, environment: Mapping[str, str]
) -> tuple[argparse.Namespace, World]:
    """Return the command line's values and the job this process is part of; ends with status 2 if they cannot be."""
    parser = Parser(
        "megatron-sorted doctor",
        DESCRIPTION,
        "torchrun --nproc-per-node 8 -m megatron_sorted doctor RUN.yaml --network",
    )
    parser.add_argument(
        "run", nargs="?", type=Path, metavar="RUN.yaml", help="settings of a run to check as well"
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        metavar="NAME",
        help=f"{', '.join(DEVICES)}: where to run (%(default)s)",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="processes the run is meant for (default: those of the job)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="where to try the disk (default: --save of the run, else here)",
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
        help="how long a process may keep others waiting (%(default)s)",
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
            "--network: this is one process. Start one on every device: torchrun ... -m megatron_sorted doctor --network."
        )
    if values.network and missing:
        parser.error(
            f"--network: {' and '.join(missing)} unset. Export the first node's name and a free port, the same on all nodes."
        )
    if values.network and values.limit_seconds <= 0:
        parser.error(f"--limit-seconds: {values.limit_seconds} is not above 0.")
    return values, world


def show(
    by_host: Mapping[str, Sequence[Finding]],
    figures: Sequence[Mapping[str, Any]],
    values: argparse.Namespace,
) -> int:
    """Print what was found; returns the exit status."""
    if values.json:
        print(json.dumps(as_data(by_host, figures), indent=1), flush=True)
    else:
        width = min(WIDEST, max(NARROWEST, shutil.get_terminal_size((WIDEST, 24)).columns))
        print(as_text(by_host, width), flush=True)
    return int(worst(finding for findings in by_host.values() for finding in findings) == FAIL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine this machine or a job and return the exit status."""
    environment = dict(os.environ)
    values, world = read_arguments(arguments, environment)
    question = DoctorOptions(
        environment, world, values.device, values.run, values.folder, values.world_size
    )
    if values.network:
        from megatron_sorted.doctor.network.job import examine_job

        return examine_job(
            question, values.limit_seconds, lambda found, figures: show(found, figures, values)
        )
    if world.local_rank > 0:
        return 0
    return show({os.uname().nodename: look_around(question)}, (), values)
