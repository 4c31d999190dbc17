"""``megatron-sorted examples``: the files of an installation that users read and change."""

from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.commands.parser import Parser
from megatron_sorted.installation import copy_shipped_files

DESCRIPTION = """\
Copy example runs, site files and launchers into DIR/examples and DIR/slurm. The launchers start the
installed package: name its Python in the site file, or start them with megatron-sorted launch."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Copy the files and print their names."""
    parser = Parser("megatron-sorted examples", DESCRIPTION, "megatron-sorted examples my_runs")
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="folder to copy into, created if missing"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    values = parser.parse_args(arguments)
    for path in copy_shipped_files(values.directory, values.overwrite):
        print(f"wrote {path}")
