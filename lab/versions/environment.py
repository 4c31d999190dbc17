"""Environments that have this one's packages, but another megatron-core.

    python -m lab.versions.environment 0.19.2 .venv-megatron/0.19.2

makes one, unless it is there, and prints the path of its Python.
"""

import argparse
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from megatron_sorted.command_line import run_main
from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.versions import check_megatron_version

# The code of megatron-core from 0.17 on runs on Python 3.10 and 3.11 too, but its package asks for
# 3.12. Its dependencies are the ones that this environment has.
PIP_OPTIONS = ("--no-deps", "--ignore-requires-python", "--retries", "1", "--timeout", "20")


class NotInstalledError(PlatformError):
    """Pip could not bring a version of megatron-core."""


def python_with(version: str, folder: Path) -> Path:
    """Return the Python of an environment in ``folder`` with this megatron-core.

    An environment that an earlier call has completed for the same version and the same Python is
    returned as it is.

    Raises:
        PlatformError: This program does not support the version; nothing was installed.
        NotInstalledError: Pip could not install it; the message ends with pip's last line.
    """
    check_megatron_version(version)
    folder = folder.absolute()
    python, ready = folder / "bin" / "python", folder / ".ready"
    packages = sysconfig.get_path("purelib")
    made_for = f"megatron-core {version} over {packages}\n"
    if ready.is_file() and ready.read_text(encoding="utf-8") == made_for:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    _run("-m", "venv", "--without-pip", folder)
    installed = _run(
        *("-m", "pip", "--python", python, "install", "-q", "--disable-pip-version-check"),
        *(*PIP_OPTIONS, f"megatron-core=={version}"),
    )
    if installed.returncode:
        reason = installed.stdout.strip().rpartition("\n")[2]
        raise NotInstalledError(
            f"megatron-core {version}: pip could not install it. Install a released version, and "
            f"see whether pip reaches an index that has it. pip's last line: {reason}"
        )
    # Only after pip, which would take this environment's megatron-core for an installed one. A
    # folder of a .pth file comes after the environment's own.
    [site_packages] = folder.glob("lib/python3*/site-packages")
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
            f"{folder}: this environment sees megatron-core {seen.stdout.strip() or 'nowhere'} "
            f"instead of {version}. Unset PYTHONPATH. {seen.stderr[-500:]}"
        )
    ready.write_text(made_for, encoding="utf-8")
    return python


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def main() -> None:
    """Make an environment and print the path of its Python."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", help="of megatron-core")
    parser.add_argument("folder", type=Path, help="of the environment")
    options = parser.parse_args()
    print(python_with(options.version, options.folder))


if __name__ == "__main__":
    run_main(main)
