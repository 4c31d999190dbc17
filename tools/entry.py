"""Start a command of the package or of lab/ from a clone, for the entry points in tools/."""

import os
import re
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]


def run(module: str, *arguments: str) -> NoReturn:
    """Replace this process with ``python -m MODULE ARGUMENTS`` and its own arguments.

    The clone need not be installed. A new process is needed because Python would import the files
    in tools/ instead of packages of the same names. Where Python has ``-P`` (3.11), modules in the
    current folder are not imported either.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    safe = ["-P"] if sys.version_info >= (3, 11) else []
    options = [*options_of_python(), *safe, "-m", module, *arguments, *sys.argv[1:]]
    os.execve(sys.executable, [sys.executable, *options], {**os.environ, "PYTHONPATH": path})


def options_of_python() -> list[str]:
    """Return the options that Python was started with, except those that forbid PYTHONPATH."""
    before = len(sys.orig_argv) - len(sys.argv)
    if sys.orig_argv[before:] != sys.argv:  # Python was started without a command line of its own
        return []
    return [
        option for option in sys.orig_argv[1:before] if not re.fullmatch(r"-\w*[EI]\w*", option)
    ]
