"""Daemons that tests start, known by the files that hold their process numbers."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil


def end_daemons(pid_files: Iterable[Path], seconds: float = 20) -> None:
    """End daemons and wait until they have ended; kill those that still run after ``seconds``.

    One that never started, or ended by itself, is no error.
    """
    processes = []
    for path in pid_files:
        with suppress(OSError, ValueError, psutil.NoSuchProcess):
            processes.append(psutil.Process(int(path.read_text())))
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=seconds)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=seconds)
