"""Stand-ins for ssh, SLURM and torchrun, in bash.

The commands that launchers send to hosts run here, and torchrun records its arguments.
"""

import sys
from pathlib import Path

from tests.support.clean_environment import clean_environment

SSH = """\
host=${*: -1} command=
for word; do [ "$word" != -G ] || { echo "hostname ${host#*@}"; exit; }; done
host=${*: -2:1} command=${*: -1}
[ "$host" != far ] || { echo "far: Permission denied (publickey,password)."; exit 255; }
[ "$host" != bare ] || command=${command//"cd\\ "/"cd\\ /nowhere"}
[ "$host" != deaf ] || [[ $command != *attend* ]] || exec sleep 90
[ "$host" != empty ] || command=${command//node.sh/no.sh}
exec env --default-signal bash -c "$command" # as on another host, where no signal is ignored
"""
# It also runs the commands of launch_facts.py.
PYTHON = f"""\
for word; do
    [ "$word" = torch.distributed.run ] || continue
    printf '%s\\0' "$@" > "$SORTED_RECORDS/${{SORTED_HOST:-$SLURMD_NODENAME}}"
    [ -z "${{STAYS:-}}" ] || exec sleep 300
    exit
done
exec {sys.executable} "$@"
"""
SCONTROL = """\
case "$1 $2" in
    "show hostnames") printf '%s\\n' n0 n1 ;;
    "show node") echo "NodeName=$3 NodeAddr=${NODE_ADDR:-10.0.0.1} NodeHostName=$3" ;;
    requeue*) [ -z "${REQUEUE_FAILS:-}" ] || exit 1; echo "requeue $2"; kill -KILL $PPID ;;
esac
"""
SRUN = """\
while [[ $1 == --* ]]; do shift; done
for number in 0 1; do SLURM_NODEID=$number SLURMD_NODENAME=n$number "$@" || status=$?; done
exit ${status:-0}
"""


def write_program(path: Path, text: str) -> None:
    """Write an executable bash script."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def stand_ins(folder: Path, **more: object) -> dict[str, str]:
    """Return the environment in which the stand-ins are found, and ``more``.

    ``folder / "arguments"`` gets a file for every host.

    The site file must name ``folder / "bin" / "python"`` as PYTHON.
    """
    (folder / "arguments").mkdir(exist_ok=True)
    for name, text in {"ssh": SSH, "scontrol": SCONTROL, "srun": SRUN, "python": PYTHON}.items():
        write_program(folder / "bin" / name, text)
    ours = clean_environment(SORTED_RECORDS=folder / "arguments", **more)
    return {**ours, "PATH": f"{folder / 'bin'}:{ours['PATH']}"}


def torchrun_arguments(folder: Path) -> dict[str, list[str]]:
    """Return {host: arguments with which torchrun was started}."""
    records = (folder / "arguments").iterdir()
    return {path.name: path.read_text().split("\0")[:-1] for path in records}
