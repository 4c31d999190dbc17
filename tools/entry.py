"""Start a command of the package or of lab/ from a clone, under the name that it has in tools/."""

import os
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]


def run(module: str, *words: str) -> NoReturn:
    """Replace this process with ``python -m MODULE WORDS`` and the arguments of this one; the clone need not be installed.

    A process of its own, because Python would find the files beside this one before packages of the same names.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.execve(
        sys.executable,
        [sys.executable, "-m", module, *words, *sys.argv[1:]],
        {**os.environ, "PYTHONPATH": path},
    )
