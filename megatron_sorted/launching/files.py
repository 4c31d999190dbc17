"""Files that come with the package and are not Python: examples of runs, site files of clusters, launchers for SLURM and ssh."""

import shutil
from pathlib import Path

from megatron_sorted.errors import SettingsError

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = ("examples", "slurm")


def shipped(folder: str) -> Path:
    """Return where a folder of ``FOLDERS`` lies: in the package where it is installed, beside it in a clone.

    Raises:
        SettingsError: It is in neither.
    """
    for place in (PACKAGE / folder, PACKAGE.parent / folder):
        if place.is_dir():
            return place
    raise SettingsError(
        f"{folder}: did not come with this installation of megatron_sorted. Install it anew, from a wheel or in a clone."
    )


def copy_out(target: Path, overwrite: bool) -> list[Path]:
    """Copy all that is shipped into a folder, and return the files that were written.

    Raises:
        SettingsError: One of them exists and may not be replaced; then none is written.
    """
    sources = {
        Path(folder) / path.relative_to(shipped(folder)): path
        for folder in FOLDERS
        for path in sorted(shipped(folder).rglob("*"))
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    there = [target / name for name in sources if (target / name).exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise SettingsError(
            f"{there[0]}{more}: exists already. Give another folder, or --overwrite to replace what is there."
        )
    for name, source in sources.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target / name)  # with its mode: launchers stay executable
    return [target / name for name in sources]
