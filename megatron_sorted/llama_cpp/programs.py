"""The programs of llama.cpp on this machine: where they are, and how they are run."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.errors import PlatformError

VARIABLE = "MEGATRON_SORTED_LLAMA_CPP"
"""Environment variable that names a folder of llama.cpp, as --llama-cpp does."""
CONVERTER, QUANTISER, SERVER = "convert_hf_to_gguf.py", "llama-quantize", "llama-server"
SOURCES = (".", "vendor/llama.cpp", "llama_cpp_python-*/vendor/llama.cpp")
"""Folders below the named one that may hold the sources."""
BUILDS = ("build_without_amx/bin", "build/bin", "bin", ".")
"""Folders below it that may hold programs: first those that run on every CPU."""
LAST_LINES = 12
"""Lines of a failed program's output that an error shows."""


@dataclass(frozen=True)
class LlamaCpp:
    """The programs that were found.

    Attributes:
        converter: convert_hf_to_gguf.py, within llama.cpp's sources.
        quantiser: llama-quantize.
        server: llama-server.
    """

    converter: Path | None = None
    quantiser: Path | None = None
    server: Path | None = None


def default_folder() -> Path:
    """Return the folder in the user's cache into which ``lab.build_llama_cpp`` builds."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama_cpp_contest"


def find_llama_cpp(folder: Path | None = None) -> LlamaCpp:
    """Return llama.cpp's programs; None for each that is nowhere.

    They are looked for in ``folder``, else in the folder that the environment variable names, else
    on the PATH and in the folder of ``lab.build_llama_cpp``.

    Raises:
        PlatformError: A folder was named that holds none of them.
    """
    named = folder or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is not None:
        programs = _in_folder(named)
        if programs == LlamaCpp():
            raise PlatformError(
                f"{'--llama-cpp' if folder else VARIABLE}: {named} holds neither {CONVERTER} nor a "
                f"build. Name a clone of llama.cpp, or the folder into which it was built."
            )
        return programs
    default = _in_folder(default_folder())
    on_path = {name: shutil.which(name) for name in (CONVERTER, QUANTISER, SERVER)}
    return LlamaCpp(
        *(
            Path(on_path[name]) if on_path[name] else other
            for name, other in (
                (CONVERTER, default.converter),
                (QUANTISER, default.quantiser),
                (SERVER, default.server),
            )
        )
    )


def _in_folder(folder: Path) -> LlamaCpp:
    def first(name: str, places: Sequence[str]) -> Path | None:
        return next(_files(folder.absolute(), name, places), None)

    return LlamaCpp(first(CONVERTER, SOURCES), first(QUANTISER, BUILDS), first(SERVER, BUILDS))


def _files(folder: Path, name: str, places: Sequence[str]) -> Iterator[Path]:
    for place in places:
        parents = [folder] if place == "." else sorted(folder.glob(place))
        yield from (parent / name for parent in parents if (parent / name).is_file())


def run_program(
    command: Sequence[object], variables: Mapping[str, str] | None = None, remedy: str = ""
) -> str:
    """Run a program to its end; return what it wrote to its standard output.

    Args:
        command: The command.
        variables: Further environment variables.
        remedy: Sentence that ends the error.

    Raises:
        PlatformError: It cannot be started, or ended with an error; the message has its last lines.
    """
    arguments = [str(word) for word in command]
    name = next(Path(word).name for word in arguments if word != sys.executable)
    try:
        done = subprocess.run(
            arguments,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, **(variables or {})},
            check=False,
        )
    except OSError as error:
        raise PlatformError(f"{arguments[0]}: {error.strerror}. Name another llama.cpp.") from error
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).split("\n") if line.strip()]
        raise PlatformError(
            f"{name} ended with status {done.returncode}. Its last lines:\n  "
            + "\n  ".join(line[:300] for line in lines[-LAST_LINES:])
            + (f"\n{remedy}" if remedy else "")
        )
    return done.stdout


def shown_command(command: Sequence[object]) -> str:
    """Return a command as a shell reads it.

    >>> shown_command(["llama-server", "--model", Path("my model.gguf")])
    "llama-server --model 'my model.gguf'"
    """
    return shlex.join(str(word) for word in command)
