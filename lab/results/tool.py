"""Options and folders that the commands share which train, measure and write a page."""

import argparse
import shutil
from pathlib import Path

from lab.results.steps import ROOT


def add_folder_options(
    part: argparse.ArgumentParser, folder: str, repeated: str, seeds: int
) -> None:
    """Add the options for folders and for the amount of work.

    Args:
        part: The parser that gets them.
        folder: Default of --output, for the help.
        repeated: What --seeds repeats, for the help.
        seeds: Default of --seeds.
    """
    part.add_argument("--output", type=Path, help=f"folder for data and runs (default: {folder})")
    part.add_argument(
        "--docs",
        type=Path,
        help="folder that gets a page in results/ and a picture in images/"
        " (default: docs; with --quick: in --output)",
    )
    part.add_argument(
        "--seeds",
        type=int,
        default=seeds,
        help=f"trainings of each {repeated}, with seeds 1, 2, ... (%(default)s)",
    )
    part.add_argument(
        "--quick", action="store_true", help="next to no training: only shows that everything runs"
    )
    part.add_argument("--fresh", action="store_true", help="repeat finished steps")


def open_folders(values: argparse.Namespace, kind: str) -> tuple[Path, Path, Path]:
    """Return the folder of data and runs, the same as commands name it, and that of the page.

    Commands name folders of this clone by relative paths, so that they can be read and copied. With
    --fresh the records of finished steps are removed.
    """
    folder = (
        values.output or ROOT / "runs" / f"{kind}{'_quick' * values.quick}" / values.part
    ).resolve()
    docs = (values.docs or (folder / "docs" if values.quick else ROOT / "docs")).resolve()
    if values.fresh:
        shutil.rmtree(folder / "finished_steps", ignore_errors=True)
    return folder, folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder, docs


def show_page(page: Path, picture: Path, quick: bool) -> None:
    """Print the page and where it is."""
    print(page.read_text(encoding="utf-8"))
    print(
        f"written: {page}, {picture}"
        + (" (--quick: nothing was learned, the numbers mean nothing)" if quick else "")
    )
