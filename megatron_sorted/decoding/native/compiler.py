"""The C++ compiler of this machine: which one, for which instructions, and how it is run."""

import os
import platform
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

SOURCE = Path(__file__).parent / "source"
MAIN = "pass.cpp"
COMPILERS = ("c++", "g++", "clang++")
COMPILER_VARIABLE = "CXX"
FLAGS = (
    "-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden",
    # the source says which product and sum are one instruction; nothing that would reorder sums
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
COMPILE_SECONDS, ASK_SECONDS = 300.0, 30.0
"""Longest time of a compilation, and of a question such as for the version."""
NO_SPACE = ("No space left on device", "Disk quota exceeded")
Targets = Sequence[tuple[str, ...]]
"""Flags that choose the instructions, best first; the first that the compiler knows are used."""


class NativeError(Exception):
    """The library cannot be built, loaded or used here; the message says why, without a stop."""


class CacheError(NativeError):
    """The folder of compiled libraries cannot be used; another one may."""


class TimeLimitError(NativeError):
    """A program did not end in time."""


def find_compiler(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the command of the C++ compiler: that of the variable CXX, else the first on the path.

    CXX may hold options (``ccache g++``), or a path with spaces.

    Raises:
        NativeError: There is none.
    """
    path = environment.get("PATH")
    if named := environment.get(COMPILER_VARIABLE, "").strip():
        try:
            command = [named] if os.path.isfile(named) else shlex.split(named)
        except ValueError as error:
            raise NativeError(f"{COMPILER_VARIABLE}={named} is no command: {error}") from error
        program = shutil.which(command[0], path=path) if command else None
        if program is None:
            raise NativeError(f"{COMPILER_VARIABLE}={named} names no program that can be run")
        return (program, *command[1:])
    for name in COMPILERS:
        if program := shutil.which(name, path=path):
            return (program,)
    raise NativeError(
        f"no C++ compiler ({', '.join(COMPILERS)}) was found; {COMPILER_VARIABLE} may name one"
    )


def compiler_identity(command: Sequence[str], path: str | None = None) -> str:
    """Return a text that changes when a compiler is replaced; it is not run.

    Programs behind a wrapper (``ccache g++``) count too.
    """
    lines = []
    for word in command:
        program = shutil.which(word, path=path)
        if program is None:
            lines.append(word)
        else:
            real = os.path.realpath(program)
            status = os.stat(real)
            lines.append(f"{real} {status.st_size} {status.st_mtime_ns}")
    return "\n".join(lines)


def targets_of(machine: str) -> Targets:
    """Return the targets of this machine's CPU, given the name of its architecture.

    On x86 ``-mcpu=native`` is an old spelling that adds no instructions, on ARM ``-march=native``
    is unknown to older compilers.
    """
    if machine in ("x86_64", "AMD64"):
        return (("-march=native",), ())
    return (("-mcpu=native",), ("-march=native",), ())


def own_targets() -> Targets:
    """Return the targets of this CPU."""
    return targets_of(platform.machine())


def run_program(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] = os.environ
) -> tuple[int, str]:
    """Run a program with a time limit; return its status and all that it printed.

    A program that does not end in time is ended with the programs that it has started: a compiler
    is several, and one of them would keep the output open.

    Raises:
        NativeError: It does not start.
        TimeLimitError: It did not end in time.
    """
    name = os.path.basename(command[0])
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**environment, "LC_ALL": "C"},
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise NativeError(f"{command[0]} does not start ({error.strerror})") from error
    with process:
        try:
            printed, _ = process.communicate(timeout=seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise TimeLimitError(f"{name} did not end within {seconds:.0f} s") from error
    return process.returncode, printed


def first_reason(status: int, printed: str) -> str:
    """Return why a program failed, in one line: its first error, else its first line."""
    if status < 0:
        return f"crashed with {signal.Signals(-status).name}"
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    for line in errors or lines:
        return line[:300]
    return f"ended with status {status} and printed nothing"


def compile_library(
    command: Sequence[str], target: Sequence[str], library: Path, environment: Mapping[str, str]
) -> None:
    """Compile the source into ``library``; the compiler's own files lie beside it.

    Raises:
        CacheError: The folder is full.
        NativeError: The compiler fails, or writes nothing.
    """
    status, printed = run_program(
        [*command, *FLAGS, *target, str(SOURCE / MAIN), "-o", str(library)],
        COMPILE_SECONDS,
        {**environment, "TMPDIR": str(library.parent)},
    )
    if any(text in printed for text in NO_SPACE):
        raise CacheError(f"the folder {library.parent.parent} is full")
    if status != 0:
        raise NativeError(f"the compiler {command[0]} failed: {first_reason(status, printed)}")
    if not library.is_file():
        raise NativeError(f"the compiler {command[0]} wrote no library")


def compiler_version(command: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """Return the first line of what a compiler says about its version.

    Raises:
        NativeError: It does not run.
    """
    status, printed = run_program([*command, "--version"], ASK_SECONDS, environment)
    if status != 0 or not printed.strip():
        raise NativeError(f"the compiler {command[0]} failed: {first_reason(status, printed)}")
    return printed.strip().splitlines()[0].strip()


def instructions_for(
    command: Sequence[str], targets: Targets, environment: Mapping[str, str] = os.environ
) -> str:
    """Return the instructions that a library would use, without compiling it.

    The compiler is question for its macros, by which the source decides too: see
    ``native_instructions`` in pass.cpp.

    Raises:
        NativeError: The compiler fails.
    """
    for target in targets:
        question = [*command, *FLAGS[:2], *target, "-E", "-dM", "-x", "c++", os.devnull]
        status, printed = run_program(question, ASK_SECONDS, environment)
        if status == 0:
            return instructions_of({line.split()[1] for line in printed.splitlines() if line[8:]})
    raise NativeError(f"the compiler {command[0]} failed: {first_reason(status, printed)}")


def instructions_of(macros: set[str]) -> str:
    """Return the name of the instructions that the source uses for a target with these macros.

    A set of instructions counts only with those that the source needs beside it; see vectors.h.

    >>> instructions_of({"__AVX2__", "__FMA__", "__SSE2__"})
    'AVX2'
    """
    if {"__AVX512F__", "__AVX512BW__"} <= macros:
        more = [name for name in ("VNNI", "BF16") if f"__AVX512{name}__" in macros]
        return " with ".join(["AVX512", *([" and ".join(more)] if "VNNI" in more else [])])
    if {"__AVX2__", "__FMA__"} <= macros:
        return "AVX2"
    return "NEON" if "__aarch64__" in macros else "portable"
