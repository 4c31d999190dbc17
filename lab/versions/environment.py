"""Environments that have this one's packages, but another megatron-core.

    python -m lab.versions.environment 0.19.2 .venv-megatron/0.19.2

makes one, unless it is there, and prints the path of its Python.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

from lab.versions.virtual_environment import (
    NotInstalledError,
    environment,
    pip_install,
    print_python,
)
from megatron_sorted.command_line import run_main
from megatron_sorted.platform.versions import check_megatron_version

# The code of megatron-core from 0.17 on runs on Python 3.10 and 3.11 too, but its package asks for
# 3.12. Its dependencies are the ones that this environment has.
PIP_OPTIONS = ("--no-deps", "--ignore-requires-python", "--retries", "1", "--timeout", "20")


def python_with(version: str, folder: Path) -> Path:
    """Return the Python of an environment in ``folder`` with this megatron-core.

    An environment that an earlier call has completed for the same version and the same Python is
    returned as it is.

    Raises:
        PlatformError: This program does not support the version; nothing was installed.
        NotInstalledError: Pip could not install it; the message ends with pip's last line.
    """
    check_megatron_version(version)
    packages = sysconfig.get_path("purelib")

    def install(python: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", python]
        pip_install(pip, "megatron-core", *PIP_OPTIONS, f"megatron-core=={version}")
        # Only after pip, which would take this environment's megatron-core for an installed one. A
        # folder of a .pth file comes after the environment's own.
        [site_packages] = python.parents[1].glob("lib/python3*/site-packages")
        (site_packages / "project.pth").write_text(
            f"import site; site.addsitedir({packages!r})\n", encoding="utf-8"
        )
        seen = subprocess.run(
            [python, "-c", "import importlib.metadata as m; print(m.version('megatron-core'))"],
            text=True,
            capture_output=True,
            check=False,
        )
        if seen.stdout.strip() != version:
            raise NotInstalledError(
                f"{python.parents[1]}: this environment sees megatron-core "
                f"{seen.stdout.strip() or 'nowhere'} instead of {version}. "
                f"Unset PYTHONPATH. {seen.stderr[-500:]}"
            )

    made_for = f"megatron-core {version} over {packages}\n"
    return environment(folder, made_for, install, "--without-pip")


if __name__ == "__main__":
    run_main(lambda: print_python(__doc__, "megatron-core", python_with))
