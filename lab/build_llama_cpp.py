"""Build llama.cpp from the sources inside the llama-cpp-python package, for `lab.contest`.

    python -m lab.build_llama_cpp                              into the user's cache
    python -m lab.build_llama_cpp --folder DIR --jobs 8        into another folder

pip brings the package's sources, whose SHA-256 is checked, and cmake and ninja where the machine
has none, into a virtual environment of their own. Where the CPU has AMX, a second build without it
is made: on some machines llama.cpp's AMX kernel stops with two tokens or more. A second call
continues, and builds nothing that is there.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.errors import PlatformError
from megatron_sorted.llama_cpp.programs import default_folder

VERSION = "0.3.36"
"""Version of llama-cpp-python."""
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
"""SHA-256 of its source archive."""
NAME = f"llama_cpp_python-{VERSION}"
TARGETS = ("llama-server", "llama-quantize", "llama-bench")
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF",
    # nothing that downloads, and no programs beside the targets
    "-DLLAMA_OPENSSL=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
)  # fmt: skip
WITHOUT_AMX = "-mno-amx-int8 -mno-amx-bf16 -mno-amx-tile"
"""Compiler flags of the second build: with GGML_NATIVE the CPU decides, not GGML_AMX_*."""


@dataclass(frozen=True)
class LlamaPrograms:
    """A build of llama.cpp.

    Attributes:
        sources: Folder of its sources, with the converter of Hugging Face directories.
        programs: Folder of the programs.
        programs_for_batches: Folder of those that may read several tokens at once; another one
            where the CPU has AMX.
    """

    sources: Path
    programs: Path
    programs_for_batches: Path


def has_amx(cpu_information: str | None = None) -> bool:
    """Return whether the CPU has AMX, as /proc/cpuinfo says.

    >>> has_amx("flags : fpu avx512_vnni amx_bf16 amx_tile amx_int8")
    True
    """
    if cpu_information is None:
        file = Path("/proc/cpuinfo")
        cpu_information = file.read_text(encoding="utf-8") if file.exists() else ""
    return "amx_tile" in cpu_information.split()


def find_build(folder: Path) -> LlamaPrograms:
    """Return the build in a folder.

    Raises:
        PlatformError: There is none, or it is not complete.
    """
    build = folder / "build" / "bin"
    other = folder / "build_without_amx" / "bin" if has_amx() else build
    for place in (build, other):
        for target in TARGETS:
            if not (place / target).is_file():
                raise PlatformError(
                    f"{place / target}: there is no such program. Build it with "
                    f"python -m lab.build_llama_cpp --folder {folder}."
                )
    return LlamaPrograms(folder / NAME / "vendor" / "llama.cpp", build, other)


def build(folder: Path, sdist: Path | None, jobs: int) -> LlamaPrograms:
    """Build what is missing in a folder; return the build.

    Args:
        folder: The folder; it should not lie in the repository.
        sdist: The package's source archive; None to let pip bring it.
        jobs: Number of compilations at once.

    Raises:
        PlatformError: The sources cannot be had, or a program failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = unpack(folder, sdist)
    cmake, environment = find_cmake(folder)
    builds = {"build": ()}
    if has_amx():
        flags = (f"-DCMAKE_C_FLAGS={WITHOUT_AMX}", f"-DCMAKE_CXX_FLAGS={WITHOUT_AMX}")
        builds["build_without_amx"] = flags
    for name, more in builds.items():
        target = folder / name
        configure = [cmake, "-S", sources, "-B", target, "-G", "Ninja", *OPTIONS, *more]
        _run(configure, folder / f"{name}.log", environment)
        compile_ = [cmake, "--build", target, "-j", jobs, "--target", *TARGETS]
        _run(compile_, folder / f"{name}.log", environment)
    return find_build(folder)


def unpack(folder: Path, sdist: Path | None) -> Path:
    """Return the folder of llama.cpp's sources, unpacked if they are not yet there.

    Raises:
        PlatformError: The archive cannot be had, or is another one than was tested.
    """
    sources = folder / NAME / "vendor" / "llama.cpp"
    if (sources / "CMakeLists.txt").is_file():
        return sources
    archive = sdist or folder / f"{NAME}.tar.gz"
    if not archive.is_file() and sdist is None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        _run([*command, "-d", folder, f"llama-cpp-python=={VERSION}"], folder / "pip.log")
    if not archive.is_file():
        raise PlatformError(f"{archive}: there is no such file. Leave --sdist out: pip brings it.")
    with archive.open("rb") as file:
        sha256 = (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )
    if sha256 != SHA256:
        raise PlatformError(
            f"{archive}: its SHA-256 is {sha256}, not {SHA256}. Use the source archive of "
            f"llama-cpp-python {VERSION}."
        )
    whole = folder / f"{NAME}.partial"
    shutil.rmtree(whole, ignore_errors=True)
    with tarfile.open(archive) as packed:
        packed.extractall(whole, filter="data")
    (whole / NAME).rename(folder / NAME)
    whole.rmdir()
    return sources


def find_cmake(folder: Path) -> tuple[Path | str, dict[str, str]]:
    """Return cmake, and the environment in which it finds ninja.

    Raises:
        PlatformError: The machine has neither, and pip cannot bring them.
    """
    environment = dict(os.environ)
    if shutil.which("cmake") and shutil.which("ninja"):
        return "cmake", environment
    tools = folder / "tools" / "bin"
    if not (tools / "ninja").exists():
        _run([sys.executable, "-m", "venv", folder / "tools"], folder / "tools.log")
        _run([tools / "pip", "install", "-q", "cmake", "ninja"], folder / "tools.log")
    environment["PATH"] = f"{tools}{os.pathsep}{environment.get('PATH', '')}"
    return tools / "cmake", environment


def _run(command: Sequence[object], log: Path, environment: dict[str, str] | None = None) -> None:
    arguments = [str(word) for word in command]
    print(f"{' '.join(arguments)}  # log: {log}", file=sys.stderr, flush=True)
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(
            arguments, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if done.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip()[-500:]
        raise PlatformError(
            f"{arguments[0]} ended with status {done.returncode}. Correct what {log} says: {last}"
        )


def main() -> None:
    """Build, and print where the programs are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=default_folder(), help="where to build (%(default)s)"
    )
    parser.add_argument("--sdist", type=Path, help="the package's source archive (pip brings it)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="(%(default)s)")
    values = parser.parse_args()
    print(build(values.folder.absolute(), values.sdist, values.jobs).programs)


if __name__ == "__main__":
    run_main(main, "The same command continues.")
