"""Compiles the C++ source on first use, and keeps the library in the user's cache.

A library is named by a hash of everything that it depends on: source, flags, compiler and CPU. So a
home that unlike machines share holds one for each. The folder is the user's alone, and a library
whose own hash is not the recorded one is never loaded.
"""

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parent / "source"
MAIN = "pass.cpp"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden",
    # the source says which product and sum are one instruction; nothing that would reorder sums
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
CACHE_VARIABLE, COMPILER_VARIABLE = "MEGATRON_SORTED_CACHE", "CXX"
SECONDS = 300.0
"""Longest time of a compilation."""


class NativeError(Exception):
    """The library cannot be built or loaded here; the message says why, without a final stop."""


@dataclass(frozen=True)
class Build:
    """How a library is built.

    Attributes:
        compiler: Command of the compiler.
        version: First line of what it says about its version.
        flags: Its flags, without input and output.
        name: Name of the library, without folder.
    """

    compiler: tuple[str, ...]
    version: str
    flags: tuple[str, ...]
    name: str


def find_compiler(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the command of the C++ compiler: that of the variable CXX, else the first on the path.

    Raises:
        NativeError: There is none.
    """
    if environment.get(COMPILER_VARIABLE):
        return tuple(shlex.split(environment[COMPILER_VARIABLE]))
    for name in COMPILERS:
        if path := shutil.which(name, path=environment.get("PATH")):
            return (path,)
    raise NativeError("no C++ compiler (c++, g++ or clang++) was found")


def cpu_name() -> str:
    """Return a text that differs between CPUs with other instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    found = {line.partition(":")[0].strip(): line for line in reversed(lines)}
    return "\n".join([platform.machine(), *(found[name] for name in wanted if name in found)])


def target_flags() -> tuple[str, ...]:
    """Return the flags that choose the instructions of this CPU."""
    return ("-mcpu=native",) if platform.machine() in ("arm64", "aarch64") else ("-march=native",)


def plan_build(
    environment: Mapping[str, str] = os.environ, target: tuple[str, ...] | None = None
) -> Build:
    """Return how the library is built here.

    Args:
        environment: The process's environment.
        target: Flags that choose the instructions; by default those of this CPU.

    Raises:
        NativeError: There is no compiler, or it does not run.
    """
    compiler = find_compiler(environment)
    try:
        done = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeError(f"the compiler {' '.join(compiler)} does not run: {error}") from error
    version = done.stdout.partition("\n")[0]
    flags = (*FLAGS, *(target_flags() if target is None else target))
    content = hashlib.sha256()
    for file in sorted(SOURCE.iterdir()):
        content.update(f"{file.name}\n".encode() + file.read_bytes())
    for text in (version, *flags, cpu_name()):
        content.update(text.encode() + b"\n")
    return Build(compiler, version, flags, f"native-{content.hexdigest()[:32]}.so")


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the user's folder for compiled libraries; it may not exist."""
    if environment.get(CACHE_VARIABLE):
        return Path(environment[CACHE_VARIABLE]) / "native"
    base = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "megatron_sorted" / "native"


def private_folder(folder: Path) -> Path:
    """Create a folder that only this user can write to; return it.

    Raises:
        NativeError: It cannot be created, or another user owns it or may write to it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError) as error:
        raise NativeError(f"the cache {folder} cannot be used: {error}") from error
    if found.st_uid != os.geteuid():
        raise NativeError(f"the cache {folder} belongs to user {found.st_uid}")
    if stat.S_IMODE(found.st_mode) & 0o022:
        raise NativeError(f"others may write to the cache {folder}: chmod 700 {folder}")
    return folder


def is_intact(library: Path) -> bool:
    """Return whether a library in the cache is the one that was built, and this user's own."""
    record = library.with_suffix(".sha256")
    try:
        if library.stat().st_uid != os.geteuid() or library.is_symlink():
            return False
        return record.read_text(encoding="ascii").strip() == _sha256(library)
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compile_into(build: Build, folder: Path) -> Path:
    """Compile the library into a folder; two processes may do so at once.

    Raises:
        NativeError: The compiler fails, or the folder is full or read-only.
    """
    library = folder / build.name
    try:
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as building:
            made = Path(building) / "library.so"
            command = [*build.compiler, *build.flags, str(SOURCE / MAIN), "-o", str(made)]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=SECONDS
            )
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if "error" in line]
                reason = (lines or done.stderr.splitlines() or [f"status {done.returncode}"])[0]
                raise NativeError(f"{build.compiler[0]} failed: {reason.strip()}")
            record = Path(building) / "record"
            record.write_text(_sha256(made) + "\n", encoding="ascii")
            os.replace(record, library.with_suffix(".sha256"))
            os.replace(made, library)
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeError(f"the library cannot be built in {folder}: {error}") from error
    return library


def built_library(
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    environment: Mapping[str, str] = os.environ,
    target: tuple[str, ...] | None = None,
) -> Path:
    """Return the library for this CPU: the one in the cache, or a new one.

    Where the cache cannot be used, the library is built in a temporary folder for this process.

    Args:
        say: Prints a line before and after a compilation.
        environment: The process's environment.
        target: Flags that choose the instructions; by default those of this CPU.

    Raises:
        NativeError: It cannot be built.
    """
    build = plan_build(environment, target)
    try:
        folder = private_folder(cache_folder(environment))
        if is_intact(folder / build.name):
            return folder / build.name
        return _compile(build, folder, say)
    except NativeError as error:
        if "failed:" in str(error):
            raise
        say(f"note: {error}; the library is built for this process alone")
    return _compile(build, Path(tempfile.mkdtemp(prefix="megatron_sorted-")), say)


def _compile(build: Build, folder: Path, say: Callable[[str], None]) -> Path:
    say("compiling the decoder for this CPU, once: some seconds")
    start = time.perf_counter()
    library = compile_into(build, folder)
    say(f"compiled in {time.perf_counter() - start:.1f} s: {library}")
    return library
