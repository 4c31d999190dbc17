"""Virtual environments of other packages, made once and found again."""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_sorted.errors import PlatformError


class NotInstalledError(PlatformError):
    """Pip could not bring a package."""


def environment(
    folder: Path, made_for: str, install: Callable[[Path], None], *options: str
) -> Path:
    """Return the Python of an environment in ``folder``, which is made unless it is complete.

    Args:
        folder: Folder of the environment; what is there is replaced.
        made_for: What it holds; one that was completed for the same is returned as it is.
        install: Called with its Python, to install what it holds.
        options: Options of Python's module venv.
    """
    folder = folder.absolute()
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.is_file() and ready.read_text(encoding="utf-8") == made_for:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", *options, folder], check=True)
    install(python)
    ready.write_text(made_for, encoding="utf-8")
    return python


def pip_install(pip: list[object], package: str, *arguments: object) -> None:
    """Install packages by the pip that ``pip`` starts.

    Raises:
        NotInstalledError: It could not; the message ends with pip's last line.
    """
    done = subprocess.run(
        [*pip, "install", "-q", "--disable-pip-version-check", *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        raise NotInstalledError(
            f"{package}: pip could not install {arguments[-1]}. Install a released version, and "
            "see whether pip reaches an index that has it. "
            f"pip's last line: {done.stdout.strip().rpartition(chr(10))[2]}"
        )


def print_python(description: str, package: str, python_with: Callable[[str, Path], Path]) -> None:
    """Make the environment that the command line names, and print the path of its Python."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", help=f"of {package}")
    parser.add_argument("folder", type=Path, help="of the environment")
    options = parser.parse_args()
    print(python_with(options.version, options.folder))
