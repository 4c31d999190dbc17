"""``megatron-sorted report``: works while a run goes on, and after kills and resumes; steps that were repeated count once."""

from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.commands.parser import Parser
from megatron_sorted.errors import DataError
from megatron_sorted.reporting.exits import compare_exits
from megatron_sorted.reporting.run_page import write_page
from megatron_sorted.reporting.run_picture import MAX_RUNS, draw
from megatron_sorted.reporting.run_reports import read_run

DESCRIPTION = """\
Draw what runs reported, as a picture and a page: losses of every exit over steps and over depth. Of
evaluation files (evaluation.json): their exits alone, as a table and a picture."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs, write the picture and the page."""
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
        help="--save directory of each run, or its metrics.jsonl; or evaluation files",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="NAME",
        help="of picture and page, without .png and .html (report; exits)",
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
            f"{len(values.runs)} runs are more than one picture can tell apart. Give at most {MAX_RUNS}."
        )
    runs = [read_run(path) for path in values.runs]
    draw(runs, picture)
    write_page(runs, picture, page)
    print(f"picture: {picture}\npage: {page}")
