"""``megatron-sorted launch``: the launchers of slurm/, which do all the work, started with this Python."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron_sorted.commands.parser import Parser
from megatron_sorted.launching.files import shipped

DESCRIPTION = """\
Train on several hosts: slurm checks a job and submits it, hosts starts it over ssh. docs/clusters.md
says what a site file holds and what is checked. The rest of the line is the launcher's:

  launch slurm gpu [--print] [--site FILE] [--nodes N] RUN.yaml [settings]
  launch hosts gpu [--print] --hosts FILE|A,B,C [--site FILE] [--logs DIR] RUN.yaml [settings]"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Become the launcher."""
    folder = shipped("slurm")
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
        "kind", choices=kinds, metavar="KIND", help=f"{' or '.join(kinds)}, what the nodes have"
    )
    words = list(sys.argv[1:] if arguments is None else arguments)
    values = parser.parse_args(words[:2])
    script = (
        [f"{values.kind}.sbatch"] if values.how == "slurm" else ["launch_hosts.sh", values.kind]
    )
    command = ["bash", str(folder / script[0]), *script[1:], *words[2:]]
    os.execvpe("bash", command, {**os.environ, "SORTED_OWN_PYTHON": sys.executable})
