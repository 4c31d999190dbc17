"""The command that starts a run."""

import shlex

from megatron_sorted.installation import ROOT
from megatron_sorted.settings.run import Settings

PROGRAM = "pretrain_sorted.py"
DEFAULT_DEVICES = {"auto": "H100", "cuda": "H100", "npu": "910B2", "cpu": "cpu"}
"""{--device: the device that a run which names none is planned for, in the table of devices}."""


def is_of_kind(planned_device: str, device: str) -> bool:
    """Return whether a device of the table can stand for a run's ``--device``.

    >>> is_of_kind("H100", "npu"), is_of_kind("910B2", "cuda"), is_of_kind("910B2", "auto")
    (False, False, True)
    """
    return device not in ("cuda", "npu") or planned_device.startswith("910") == (device == "npu")


def launch_line(
    settings: Settings,
    config: str,
    changes: list[str],
    world_size: int,
    per_host: int,
    in_clone: bool = (ROOT / PROGRAM).is_file(),
) -> str:
    """Return the command that starts ``world_size`` processes of a run.

    It is torchrun on one host, a launcher of slurm/ on several; SITE stands for the cluster's site
    file.

    Args:
        settings: The run.
        config: The path of its YAML file.
        changes: Flags that follow the file.
        world_size: The number of processes.
        per_host: The number of devices of one host.
        in_clone: Whether the scripts of a clone are there; an installation has commands instead.
    """
    flags = "".join(f" {shlex.quote(argument)}" for argument in changes)
    if world_size <= per_host or settings.device == "cpu":
        program = PROGRAM if in_clone else "-m megatron_sorted train"
        return (
            f"torchrun --nproc-per-node {world_size} {program} --config "
            f"{shlex.quote(config)}{flags}"
        )
    kind = "npu" if settings.device == "npu" else "gpu"
    launcher = f"slurm/{kind}.sbatch" if in_clone else f"megatron-sorted launch slurm {kind}"
    nodes = -(-world_size // per_host)
    return f"{launcher} --site SITE --nodes {nodes} {shlex.quote(config)}{flags}"
