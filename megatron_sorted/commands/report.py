"""``megatron-sorted report``: pictures and pages of runs.

The command works while a run continues, and after kills and resumes; repeated steps count once.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.commands.parser import Parser
from megatron_sorted.errors import DataError
from megatron_sorted.reporting.exits import compare_exits
from megatron_sorted.reporting.run_page import write_page
from megatron_sorted.reporting.run_picture import MAX_RUNS, draw
from megatron_sorted.reporting.run_reports import read_run

DESCRIPTION = """\
Draw what runs reported, as a picture and a page: losses of every exit over steps and over depth.
From evaluation files that training writes (RUN/evaluation.json): a table and a picture of their
exits."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs and write the picture and the page."""
    parser = Parser(
        "megatron-sorted report",
        DESCRIPTION,
        "megatron-sorted report runs/nested runs/plain --output compared",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="--save directory or metrics.jsonl of each run, or evaluation files",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="NAME",
        help="name of picture and page without suffix (default: report, or exits)",
    )
    values = parser.parse_args(arguments)
    evaluations = [path for path in values.runs if path.suffix == ".json"]
    output = values.output or Path("exits" if evaluations else "report")
    name = output.with_suffix("") if output.suffix in (".png", ".html") else output
    picture, page = Path(f"{name}.png"), Path(f"{name}.html")
    if evaluations:
        print(f"{compare_exits(values.runs, picture)}\n\npicture: {picture}")
        return
    if len(values.runs) > MAX_RUNS:
        raise DataError(
            f"{len(values.runs)} runs are more than one picture can distinguish. "
            f"Give at most {MAX_RUNS}."
        )
    runs = [read_run(path) for path in values.runs]
    draw(runs, picture)
    write_page(runs, picture, page)
    print(f"picture: {picture}\npage: {page}")
