"""``megatron-sorted launch``: starts the launchers in slurm/ with this Python."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron_sorted.commands.parser import Parser
from megatron_sorted.installation import shipped_folder

DESCRIPTION = """\
Train on several hosts: slurm checks a job and submits it, hosts starts it over ssh; see
docs/clusters.md. All further arguments are passed to the launcher:

  launch slurm gpu [--print] [--site FILE] [--nodes N] RUN.yaml [settings]
  launch hosts gpu [--print] --hosts FILE|A,B,C [--site FILE] [--logs DIR] RUN.yaml [settings]"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Replace this process with the launcher."""
    folder = shipped_folder("slurm")
    kinds = sorted(path.stem for path in folder.glob("*.sbatch"))
    parser = Parser(
        "megatron-sorted launch",
        DESCRIPTION,
        "megatron-sorted launch slurm gpu --site mine.site RUN.yaml",
        usage="%(prog)s slurm|hosts KIND [options] RUN.yaml [settings]",
    )
    parser.add_argument(
        "how",
        choices=("slurm", "hosts"),
        metavar="HOW",
        help="slurm: as a job; hosts: over ssh, without a scheduler",
    )
    parser.add_argument(
        "kind", choices=kinds, metavar="KIND", help=f"device of the nodes: {' or '.join(kinds)}"
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    values = parser.parse_args(given[:2])
    script = (
        [f"{values.kind}.sbatch"] if values.how == "slurm" else ["launch_hosts.sh", values.kind]
    )
    command = ["bash", str(folder / script[0]), *script[1:], *given[2:]]
    os.execvpe("bash", command, {**os.environ, "SORTED_OWN_PYTHON": sys.executable})
