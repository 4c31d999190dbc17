"""The compiled library for this machine: from the user's cache, else compiled.

A library is named by a hash of everything that it depends on: source, flags, compiler and CPU. So a
home that unlike machines share holds one for each. A library whose own hash is not the recorded one
is never loaded. A new one is first tried in a process of its own, which alone a crash would end.
"""

import fcntl
import hashlib
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.decoding.native.compiler import (
    COMPILE_SECONDS,
    FLAGS,
    SOURCE,
    NativeError,
    Targets,
    TimeLimitError,
    compile_library,
    compiler_identity,
    find_compiler,
    first_reason,
    own_targets,
    run_program,
)
from megatron_sorted.decoding.native.cpu import check_architecture, cpu_name
from megatron_sorted.decoding.native.private_folder import (
    CacheError,
    cache_folder,
    private_folder,
    remove_stale,
    temporary_folder,
)
from megatron_sorted.installation import own_module

TRIAL_SECONDS = 120.0
BUILDING = ".building-"
Say = Callable[[str], None]


class UnusableError(NativeError):
    """A compiled library is refused for good: it crashes, or computes other numbers."""


@dataclass(frozen=True)
class Build:
    """How a library is built.

    Attributes:
        compiler: Command of the compiler.
        targets: Flags that choose the instructions, best first.
        name: Name of the library, without folder.
        environment: The process's environment.
    """

    compiler: tuple[str, ...]
    targets: Targets
    name: str
    environment: Mapping[str, str]


def plan_build(
    environment: Mapping[str, str] = os.environ, targets: Targets | None = None
) -> Build:
    """Return how the library is built here; no program is run.

    Args:
        environment: The process's environment.
        targets: Flags that choose the instructions; by default those of this CPU.

    Raises:
        NativeError: There is no compiler, or the source does not know the architecture.
    """
    check_architecture()
    compiler = find_compiler(environment)
    targets = own_targets() if targets is None else targets
    content = hashlib.sha256()
    for file in sorted(SOURCE.iterdir()):
        content.update(f"{file.name}\n".encode() + file.read_bytes())
    identity = compiler_identity(compiler, environment.get("PATH"))
    for text in (identity, repr((FLAGS, tuple(targets))), cpu_name()):
        content.update(text.encode() + b"\n")
    return Build(compiler, targets, f"native-{content.hexdigest()[:32]}.so", environment)


def say_on_stderr(text: str) -> None:
    """Print text, without a line feed of its own, on standard error."""
    print(text, end="", file=sys.stderr, flush=True)


@contextmanager
def built_library(
    say: Say = say_on_stderr,
    environment: Mapping[str, str] = os.environ,
    targets: Targets | None = None,
) -> Iterator[Path]:
    """Yield the library for this CPU: the one in the cache, or a new one. Load it at once.

    Where the cache cannot be used, the library is built in a temporary folder, which is removed.

    Args:
        say: Prints text about a compilation.
        environment: The process's environment.
        targets: Flags that choose the instructions; by default those of this CPU.

    Raises:
        NativeError: It cannot be built, or does not work.
    """
    build = plan_build(environment, targets)
    try:
        library = _from_cache(build, private_folder(cache_folder(environment)), say)
    except CacheError as error:
        say(f"note: {error}. Until then every start compiles the decoder.\n")
    else:
        yield library
        return
    with temporary_folder() as folder:
        library = folder / build.name
        _compile(build, library, say)
        yield library


def is_intact(library: Path) -> bool:
    """Return whether a library in the cache is the one that was built, and this user's own."""
    try:
        found = library.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return False
        if stat.S_IMODE(found.st_mode) & 0o022:
            return False
        return library.with_suffix(".sha256").read_text(encoding="ascii").strip() == _sha256(
            library
        )
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _from_cache(build: Build, folder: Path, say: Say) -> Path:
    """Return the library in the cache; it is compiled unless it is there and intact.

    Raises:
        CacheError: The folder is read-only or full.
        NativeError: The library cannot be built, or did not work when it was tried.
    """
    library = folder / build.name
    refused = library.with_suffix(".refused")
    if is_intact(library):
        return library
    try:
        with _locked(folder):
            if is_intact(library):  # another process was faster
                return library
            if refused.exists():
                raise NativeError(_refusal(refused))
            remove_stale(folder, BUILDING)
            with tempfile.TemporaryDirectory(prefix=BUILDING, dir=folder) as building:
                made = Path(building) / build.name
                try:
                    _compile(build, made, say)
                except (UnusableError, TimeLimitError) as error:
                    refused.write_text(f"{error}\n", encoding="utf-8")
                    raise
                record = Path(building) / "record"
                record.write_text(_sha256(made) + "\n", encoding="ascii")
                # a library without record is not intact, so that no reader sees a wrong pair
                library.with_suffix(".sha256").unlink(missing_ok=True)
                os.replace(made, library)
                os.replace(record, library.with_suffix(".sha256"))
    except OSError as error:
        raise CacheError(f"the cache {folder} cannot be written ({error.strerror})") from error
    return library


def _refusal(refused: Path) -> str:
    reason = refused.read_text(encoding="utf-8", errors="replace").strip()
    return f"{reason}; delete {refused} to try again"


def why_refused(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return why a library in the cache is not used; None if it is used, or not compiled yet.

    Raises:
        NativeError: There is no compiler.
    """
    try:
        library = cache_folder(environment) / plan_build(environment).name
        return _refusal(library.with_suffix(".refused"))
    except (CacheError, OSError):
        return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process compile at a time; one that waits too long, or cannot lock, does so too."""
    handle = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        end = time.monotonic() + COMPILE_SECONDS
        while time.monotonic() < end:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(handle)


def _compile(build: Build, library: Path, say: Say) -> None:
    """Compile the library for the first target that the compiler knows, and try it.

    Raises:
        NativeError: No compilation succeeds; the first one's reason.
        UnusableError: The library does not work.
    """
    say("compiling the decoder for this CPU, once ... ")
    start, errors = time.perf_counter(), []
    try:
        for target in build.targets:
            try:
                compile_library(build.compiler, target, library, build.environment)
                break
            except (CacheError, TimeLimitError):
                raise
            except NativeError as error:
                errors.append(error)
        else:
            raise errors[0]
        instructions = try_library(library, build.environment)
    except NativeError:
        say("it failed\n")
        raise
    library.chmod(0o700)
    say(f"{time.perf_counter() - start:.1f} s ({instructions})\n")


def try_library(library: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Run a library in a process of its own; return the instructions that it uses.

    Raises:
        UnusableError: It does not load, crashes, hangs, or computes other numbers.
    """
    command, environment = own_module(
        "megatron_sorted.decoding.native.trial", library, environment=environment
    )
    try:
        status, printed = run_program(command, TRIAL_SECONDS, environment)
    except TimeLimitError as error:
        raise UnusableError("the compiled library hangs when it is tried") from error
    if status != 0:
        lines = [line for line in printed.splitlines() if line.startswith("trial: ")]
        reason = lines[0].removeprefix("trial: ") if lines else first_reason(status, printed)
        raise UnusableError(f"the compiled library does not work here: {reason}")
    return printed.strip()
