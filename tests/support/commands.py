"""Run the project's commands as a user does, in forks of a preloaded server or cold processes."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from tests.support.clean_environment import clean_environment
from tests.support.preloaded.session import stand_in

ROOT = Path(__file__).resolve().parents[2]
MAX_OUTPUT_BYTES = 64 << 20
SHOWN_BYTES = 4000
LIMITED = """\
import os, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""


def command_line(
    script: str, *arguments: object, processes: int = 0, cold: bool = False
) -> list[str]:
    """Return the argument list that starts a script.

    Args:
        script: Path below the project's root, such as ``tools/generate.py``.
        arguments: The command's arguments.
        processes: Number of ranks, started by torchrun; 0 starts none.
        cold: Whether the real interpreter runs it, with all imports. Each command has one test of
            that; others need it for what a fork cannot show
            (``tests/support/preloaded/__init__.py``).
    """
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if processes
        else []
    )
    return [
        sys.executable if cold else stand_in(),
        *launcher,
        str(ROOT / script),
        *map(str, arguments),
    ]


def environment(**variables: object) -> dict[str, str]:
    """Return the environment in which commands run in tests."""
    return clean_environment(
        **{"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1, **variables}
    )


def run_command(
    script: str,
    *arguments: object,
    cwd: Path,
    text: str = "",
    processes: int = 0,
    seconds: float = 240,
    cold: bool = False,
    max_bytes_of_a_file: int | None = None,
    **variables: object,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return its status and output; see ``command_line``.

    Args:
        cwd: The working directory.
        text: What stands on standard input.
        seconds: Time limit.
        max_bytes_of_a_file: The bytes that the command may write into one file, like a full disk.
        variables: Environment variables beside those of ``environment``.

    Raises:
        AssertionError: The command took longer, or wrote more than 64 MB, and was killed; with the
            end of its output.
    """
    command = command_line(script, *arguments, processes=processes, cold=cold)
    if max_bytes_of_a_file is not None:
        command = [sys.executable, "-ISc", LIMITED, str(max_bytes_of_a_file), *command]
    return run(command, cwd=cwd, text=text, seconds=seconds, env=environment(**variables))


def run(
    command: list[str], *, cwd: Path, env: dict[str, str], text: str = "", seconds: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run a program like ``run_command``."""
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        given.write(text.encode("utf-8", "surrogateescape"))
        given.seek(0)
        with subprocess.Popen(
            command, cwd=cwd, env=env, stdin=given, stdout=out, stderr=err
        ) as process:
            try:
                _wait(process, out, err, time.monotonic() + seconds)
            finally:
                process.kill()
        return subprocess.CompletedProcess(command, process.returncode, _text(out), _text(err))


def _wait(process: subprocess.Popen, out: IO[bytes], err: IO[bytes], until: float) -> None:
    while process.poll() is None:
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            written = sum(stream.seek(0, 2) for stream in (out, err))
            limit = (
                "its time"
                if time.monotonic() > until
                else f"{MAX_OUTPUT_BYTES >> 20} MB"
                if written > MAX_OUTPUT_BYTES
                else None
            )
            if limit:
                process.kill()
                raise AssertionError(
                    f"{process.args} exceeded {limit}; its output ends\n"
                    f"{_text(out)[-SHOWN_BYTES:]}\n"
                    f"{_text(err)[-SHOWN_BYTES:]}"
                ) from None


def _text(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read(MAX_OUTPUT_BYTES).decode("utf-8", "replace")


def start_command(
    script: str,
    *arguments: object,
    cwd: Path,
    processes: int = 0,
    cold: bool = False,
    variables: dict[str, object] | None = None,
    **streams: object,
) -> subprocess.Popen:
    """Start a command and return its process.

    ``streams`` are those of ``subprocess.Popen`` (stdin, stdout, stderr, text).
    """
    return subprocess.Popen(
        command_line(script, *arguments, processes=processes, cold=cold),
        cwd=cwd,
        env=environment(**(variables or {})),
        **streams,
    )
