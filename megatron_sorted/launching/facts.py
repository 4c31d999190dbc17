"""Print facts about a run and this host for the launchers in slurm/, one ``name<TAB>value`` a line.

    python -m megatron_sorted.launching.facts --world-size 128 --packages torch,megatron-core \\
        -- --config RUN.yaml [settings]

A mistake in the settings is one line on stderr and status 1, as in training, but before anything is
started. Neither torch nor megatron is imported.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from megatron_sorted.checkpoint.lock import DirectoryLock
from megatron_sorted.conversion.starting_settings import starting_settings
from megatron_sorted.errors import CheckpointError
from megatron_sorted.files import same_path
from megatron_sorted.installation import PACKAGE
from megatron_sorted.settings.load import load_settings
from megatron_sorted.settings.rules import check_settings


def facts_of_run(arguments: list[str], world_size: int) -> dict[str, str]:
    """Return the facts about a run that a launcher needs.

    Raises:
        SortedError: The settings are wrong, or impossible for ``world_size`` processes.
    """
    settings = load_settings(arguments, starting_settings)
    check_settings(settings, world_size)
    save = os.path.abspath(settings.save) if settings.save else ""
    # a restarted run resumes from its own checkpoints, unless its settings start anew each time
    resumes = bool(save) and not (settings.finetune and same_path(settings.load, save))
    return {
        "device": settings.device,
        "save": save,
        "resumes": "yes" if resumes else "no",
        "timeout_seconds": str(60 * settings.distributed_timeout_minutes),
    }


def facts_of_host(packages: list[str]) -> dict[str, str]:
    """Return versions by name, which must agree on all hosts; "none" for a missing package."""
    facts = {"python": platform.python_version()}
    for package in packages:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "none"
    return {**facts, "source": source_hash(PACKAGE)}


def source_hash(package: Path) -> str:
    """Return a short hash of the program's files, which tells whether two hosts run the same."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(
            f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes() + b"\0"
        )
    return digest.hexdigest()[:12]


def check_no_other_run(directory: str) -> None:
    """Check that no other run holds the lock of a directory of checkpoints.

    Raises:
        SortedError: Another run holds it, also after the time that a stopped run may need to end;
            or the directory cannot be written.
    """
    if directory and os.path.isdir(directory):
        lock = DirectoryLock(directory)
        try:
            lock.acquire()
        except OSError as error:
            raise CheckpointError(
                f"--save: {directory} cannot be written ({error.strerror}). "
                "Give a directory that can."
            ) from error
        lock.release()


def main() -> None:
    """Print the facts that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--world-size", type=int, required=True, help="number of processes of the run"
    )
    parser.add_argument(
        "--packages", default="", help="packages whose versions to print, separated by commas"
    )
    parser.add_argument(
        "--check-lock",
        action="store_true",
        help="fail if another run saves into the same directory",
    )
    parser.add_argument("run", nargs="+", help="after --: arguments of pretrain_sorted.py")
    arguments = parser.parse_args()
    facts = facts_of_run(arguments.run, arguments.world_size)
    if arguments.check_lock:
        check_no_other_run(facts["save"])
    facts |= facts_of_host([package for package in arguments.packages.split(",") if package])
    for name, value in facts.items():
        print(f"{name}\t{value}")


def run() -> NoReturn:
    """Run the command and end the process."""
    run_main(main)


if __name__ == "__main__":
    run()
