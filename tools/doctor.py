"""Says what it sees on this machine, or on all nodes of a job, what will not work there, and the remedy.

    python tools/doctor.py                          this machine, in seconds
    python tools/doctor.py RUN.yaml                 and whether this run can be started on it
    torchrun ... tools/doctor.py --network          all nodes: versions, clocks, speed and correctness of communication
    srun ... python tools/doctor.py --network       the same; MASTER_ADDR and MASTER_PORT must be set

Every line is OK, WARN (works, but slowly, unsafely or not for long) or FAIL (will not work), with a remedy. Exit status: 0 if nothing
fails, 1 if something does, 2 for a wrong command line. It runs where torch or megatron-core are missing or broken.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))  # the checkout's own package, whether or not one is installed; as for a script in ROOT

from megatron_sorted.command import run_main, start_command  # noqa: E402

if __name__ == "__main__":
    start_command()

from doctor.devices.names import DEVICES  # noqa: E402
from doctor.finding import FAIL, Finding, worst  # noqa: E402
from doctor.local import Question, look_around  # noqa: E402
from doctor.table import as_data, as_text  # noqa: E402

from megatron_sorted.errors import PlatformError  # noqa: E402
from megatron_sorted.platform.processes import World, read_world  # noqa: E402

NARROWEST, WIDEST = 80, 160


def read_arguments(arguments: Sequence[str] | None, environment: Mapping[str, str]) -> tuple[argparse.Namespace, World]:
    """Returns the command line's values and the job this process is part of; ends with status 2 if they cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN.yaml", help="settings of a run to check as well")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to run (default: %(default)s)")
    parser.add_argument("--world-size", type=int, metavar="N", help="processes the run is meant for (default: those of the job)")
    parser.add_argument("--folder", type=Path, help="where to try the disk (default: --save of the run, else the current folder)")
    parser.add_argument("--network", action=argparse.BooleanOptionalAction, help="test communication (default: in a job)")
    parser.add_argument("--limit-seconds", type=float, default=120.0, metavar="S",
                        help="how long a process may keep the others waiting before it is named (default: %(default)s)")
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
        parser.error("--network: this is one process. Start one on every device: torchrun ... tools/doctor.py --network.")
    if values.network and missing:
        parser.error(f"--network: {' and '.join(missing)} unset. Export the first node's name and a free port, the same on all nodes.")
    if values.network and values.limit_seconds <= 0:
        parser.error(f"--limit-seconds: {values.limit_seconds} is not above 0.")
    return values, world


def show(by_host: Mapping[str, Sequence[Finding]], figures: Sequence[Mapping[str, Any]], values: argparse.Namespace) -> int:
    """Prints what was found; returns the exit status."""
    if values.json:
        print(json.dumps(as_data(by_host, figures), indent=1), flush=True)
    else:
        width = min(WIDEST, max(NARROWEST, shutil.get_terminal_size((WIDEST, 24)).columns))
        print(as_text(by_host, width), flush=True)
    return int(worst(finding for findings in by_host.values() for finding in findings) == FAIL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    environment = dict(os.environ)
    values, world = read_arguments(arguments, environment)
    question = Question(values.device, values.run, values.folder, values.world_size)
    if values.network:
        from doctor.network.job import examine_job
        from doctor.network.task import Task

        task = Task(question, ROOT, environment, world, values.limit_seconds, lambda found, figures: show(found, figures, values))
        return examine_job(task)
    if world.local_rank > 0:
        return 0
    return show({os.uname().nodename: look_around(question, ROOT, environment, world)}, (), values)


if __name__ == "__main__":
    run_main(main)
