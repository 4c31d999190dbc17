"""Draws what runs reported: losses of every exit over steps, over depth and over operations; one picture and one page.

    python tools/report.py runs/nested                                  writes report.png and report.html
    python tools/report.py runs/nested runs/plain --output compared     several runs beside each other

Works while a run goes on, and after kills and resumes: steps that were repeated count once.
"""

from megatron_sorted.command import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
from collections.abc import Sequence
from pathlib import Path

from run_report.page import write_page
from run_report.picture import MAX_RUNS, draw
from run_report.read import read_run

from megatron_sorted.errors import DataError


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the runs, writes the picture and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="--save directory of each run, or its metrics.jsonl")
    parser.add_argument("--output", type=Path, default=Path("report"), help="name of picture and page, without .png and .html")
    values = parser.parse_args(arguments)
    if len(values.runs) > MAX_RUNS:
        raise DataError(f"{len(values.runs)} runs are more than one picture can tell apart. Give at most {MAX_RUNS}.")
    runs = [read_run(path) for path in values.runs]
    name = values.output.with_suffix("") if values.output.suffix in (".png", ".html") else values.output
    picture, page = Path(f"{name}.png"), Path(f"{name}.html")
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, picture)
    write_page(runs, picture, page)
    print(f"picture: {picture}\npage: {page}")


if __name__ == "__main__":
    run_main(main)
