"""Training runs under an environment's megatron-core.

    PYTHON -m lab.versions.training runs.json

runs them one after the other. Their ranks are forks of that process, which has imported everything:
a run then costs seconds of computing, and not twenty of imports.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from lab.reliability.processes import environment
from megatron_sorted.installation import ROOT
from megatron_sorted.reading.json_text import read_json_object

IMPORTS = (
    "megatron.core.parallel_state",
    "megatron_sorted.conversion.starting_settings",
    "megatron_sorted.training.run.loop",
)


@dataclass(frozen=True)
class Run:
    """A run of the trainer, in ``folder``, whose output goes to NAME.log there."""

    name: str
    num_processes: int
    arguments: tuple[str, ...]
    folder: str

    @property
    def log(self) -> Path:
        """The file that gets the output of all ranks."""
        return Path(self.folder) / f"{self.name}.log"


def train(python: Path, runs: Sequence[Run]) -> None:
    """Do these runs in turn under the megatron-core of ``python``.

    Raises:
        RuntimeError: One failed; the message holds the end of its output.
    """
    for run in runs:
        Path(run.folder).mkdir(parents=True, exist_ok=True)
    job = Path(runs[0].folder) / "runs.json"
    job.write_text(json.dumps({"runs": [asdict(run) for run in runs]}), encoding="utf-8")
    ended = subprocess.run(
        [python, "-m", "lab.versions.training", job],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise RuntimeError(f"{python}: {ended.stderr[-3000:]}")


def _start_rank(run: Run, rank: int, port: int) -> int:
    """Fork a rank and return its process id."""
    pid = os.fork()
    if pid == 0:
        _be_rank(run, rank, port)
    return pid


def _be_rank(run: Run, rank: int, port: int) -> NoReturn:
    status = 1
    try:
        size = str(run.num_processes)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size)
        os.environ.update(LOCAL_WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        with open(run.log, "ab") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        os.chdir(run.folder)
        status = import_module("megatron_sorted.commands.train").main(list(run.arguments))
    except BaseException:  # whatever it is, the log must show it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # a fork that went on would run the parent's program


def _all_succeed(ranks: list[int]) -> bool:
    """Wait for all ranks; where one fails, end the others, which would wait for it."""
    failed, running = False, set(ranks)
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGKILL)
    return not failed


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def main() -> None:
    """Do the runs of the file that the command line names."""
    from megatron_sorted.platform.processes import (
        keep_device_packages_out,
        silence_library_warnings,
    )

    keep_device_packages_out()
    silence_library_warnings()
    for name in IMPORTS:
        import_module(name)
    for entry in read_json_object(Path(sys.argv[1]))["runs"]:
        run = Run(**{**entry, "arguments": tuple(entry["arguments"])})
        run.log.unlink(missing_ok=True)
        port = _free_port()
        if not _all_succeed([_start_rank(run, rank, port) for rank in range(run.num_processes)]):
            sys.exit(f"{run.name}: failed; the end of its output:\n{run.log.read_text()[-2500:]}")
        print(f"    {run.name}", flush=True)


if __name__ == "__main__":
    main()
