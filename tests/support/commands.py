"""Commands of the project as tests run them."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.clean_environment import clean_environment

ROOT = Path(__file__).resolve().parents[2]


def command_line(script: str, *words: object, processes: int = 0) -> list[str]:
    """Return the argument list that starts ``script`` (a path below the project's root); with ``processes``, under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    return [sys.executable, *launcher, str(ROOT / script), *map(str, words)]


def run_command(script: str, *words: object, cwd: Path, text: str = "", processes: int = 0, seconds: float = 300,
                **variables: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return its exit status and output.

    Args:
        script: Path below the project's root, such as ``tools/generate.py``.
        words: The command's arguments.
        cwd: The working directory.
        text: What stands on standard input.
        processes: Number of ranks, started by torchrun; 0 starts none.
        seconds: Time limit; ``subprocess.TimeoutExpired`` after it.
        variables: Environment variables beside PATH and HOME.
    """
    return subprocess.run(command_line(script, *words, processes=processes), cwd=cwd, env=environment(**variables), input=text,
                          text=True, capture_output=True, timeout=seconds, check=False)


def start_command(script: str, *words: object, cwd: Path, processes: int = 0, variables: dict[str, object] | None = None,
                  **streams: object) -> subprocess.Popen:
    """Start a command and return its process; ``streams`` are those of ``subprocess.Popen`` (stdin, stdout, stderr, text)."""
    return subprocess.Popen(command_line(script, *words, processes=processes), cwd=cwd, env=environment(**(variables or {})), **streams)


def environment(**variables: object) -> dict[str, str]:
    """Return the environment in which commands run in tests."""
    return clean_environment(PYTHONPATH=ROOT, OMP_NUM_THREADS=1, HF_HUB_OFFLINE=1, **variables)


__all__: Sequence[str] = ("ROOT", "command_line", "environment", "run_command", "start_command")
