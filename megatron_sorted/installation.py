"""The location of this installation: its folder, the files that come with it, its modules."""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_sorted.errors import SettingsError

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
"""The folder that holds the package: a clone's, or that of pip's installation."""
IS_CHECKOUT = ROOT.name not in ("site-packages", "dist-packages")
FOLDERS = ("examples", "slurm")
"""Folders of files that are not Python: examples of runs, site files of clusters, launchers."""


def own_module(
    name: str, *arguments: object, environment: Mapping[str, str] = os.environ
) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs a module of this package, and an environment that finds it.

    The current folder is excluded from imports (Python 3.10 has no option for that).
    """
    entries = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if IS_CHECKOUT and str(ROOT) not in entries:
        entries.insert(0, str(ROOT))
    safe = ["-P"] if sys.version_info >= (3, 11) else []
    return [sys.executable, *safe, "-m", name, *map(str, arguments)], {
        **environment,
        "PYTHONPATH": os.pathsep.join(entries),
    }


def shipped_folder(name: str) -> Path:
    """Return a folder of ``FOLDERS``: inside an installed package, beside the package in a clone.

    Raises:
        SettingsError: The folder is in neither place.
    """
    for path in (PACKAGE / name, ROOT / name):
        if path.is_dir():
            return path
    raise SettingsError(
        f"{name}: did not come with this installation of megatron_sorted. "
        "Install it again, from a wheel or in a clone."
    )


def copy_shipped_files(target: Path, overwrite: bool) -> list[Path]:
    """Copy the files of all ``FOLDERS`` into a folder, and return the written paths.

    Raises:
        SettingsError: One of them exists and may not be replaced; then none is written.
    """
    sources = {
        Path(name) / path.relative_to(folder): path
        for name in FOLDERS
        for folder in [shipped_folder(name)]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    existing = [target / name for name in sources if (target / name).exists()]
    if existing and not overwrite:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise SettingsError(
            f"{existing[0]}{more}: exists already. Give another folder, or --overwrite to replace "
            "what is there."
        )
    for name, source in sources.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target / name)  # with its mode: launchers stay executable
    return [target / name for name in sources]
