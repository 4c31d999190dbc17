"""Compilers for tests of the cache of compiled libraries: shell scripts that compile nothing."""

import os
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from megatron_sorted.decoding.native.compiler import NativeError, find_compiler
from megatron_sorted.decoding.native.library_cache import built_library

COPY = 'cp "{library}" "$out"'
"""What a compiler does that works: it writes a library that was built before."""
SCRIPT = """\
#!/bin/sh
for out; do :; done
echo "$*" >> "{log}"
{body}
"""


@cache
def session_library() -> Path:
    """Return the real library of this session, in the tests' own cache; skip without a compiler."""
    try:
        find_compiler()
    except NativeError:
        pytest.skip("no C++ compiler")
    with built_library() as path:
        assert path.exists()
        return path


@dataclass(frozen=True)
class StandIn:
    """A stand-in of a compiler, alone on a machine.

    Attributes:
        program: The script.
        environment: An environment in which it is the compiler, with a home of its own.
    """

    program: Path
    environment: dict[str, str]

    @property
    def cache(self) -> Path:
        """Return the folder where libraries are kept."""
        return Path(self.environment["HOME"]) / ".cache" / "megatron_sorted" / "native"

    @property
    def runs(self) -> list[str]:
        """Return the arguments of every run."""
        log = self.program.with_suffix(".log")
        return log.read_text().splitlines() if log.exists() else []


def stand_in(folder: Path, body: str = COPY, name: str = "cxx") -> StandIn:
    """Write a compiler; ``{library}`` in its body is the real library, ``$out`` what it writes."""
    for made in ("home", "temporary"):
        (folder / made).mkdir(exist_ok=True)
    program = folder / name
    body = body.format(library=session_library() if "{library}" in body else "")
    program.write_text(SCRIPT.format(log=program.with_suffix(".log"), body=body))
    program.chmod(0o755)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "temporary"),
        "CXX": str(program),
    }
    return StandIn(program, environment)


def small_library(folder: Path, source: str) -> Path:
    """Compile a library of some lines of C++."""
    code, library = folder / "small.cpp", folder / "small.so"
    code.write_text(f'extern "C" {{ {source} }}')
    command = [*find_compiler(), "-shared", "-fPIC", "-x", "c++", code, "-o", library]
    subprocess.run(command, check=True, timeout=60)
    return library
