"""``megatron-sorted examples``: what an installation brings beside its Python, where it can be read and changed."""

from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.commands.parser import Parser
from megatron_sorted.launching.files import copy_out

DESCRIPTION = """\
Copy example runs, site files and launchers into DIR/examples and DIR/slurm. The launchers start the
installed package; give its Python in the site file, or start them by megatron-sorted launch."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Copy and say what was written."""
    parser = Parser("megatron-sorted examples", DESCRIPTION, "megatron-sorted examples my_runs")
    parser.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="folder to copy into; it is made where it does not exist",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    values = parser.parse_args(arguments)
    for path in copy_out(values.directory, values.overwrite):
        print(f"wrote {path}")
