"""The command that starts a run."""

import shlex

from megatron_sorted.settings.run import Settings

PROGRAM = "pretrain_sorted.py"
USUAL = {"auto": "H100", "cuda": "H100", "npu": "910B2", "cpu": "cpu"}
"""{--device: what a run is planned for, of the table of devices, that does not say what it will run on}."""


def launch_line(
    settings: Settings, config: str, changes: list[str], world_size: int, per_host: int
) -> str:
    """Returns the command that starts ``world_size`` processes of a run: torchrun on one host, a launcher of slurm/ on several.

    SITE stands for the cluster's site file.

    Args:
        settings: The run.
        config: Its file.
        changes: Flags beside the file.
        world_size: Processes.
        per_host: Devices of one host.
    """
    rest = "".join(f" {shlex.quote(word)}" for word in changes)
    if world_size <= per_host or settings.device == "cpu":
        return (
            f"torchrun --nproc-per-node {world_size} {PROGRAM} --config {shlex.quote(config)}{rest}"
        )
    script = "slurm/npu.sbatch" if settings.device == "npu" else "slurm/gpu.sbatch"
    return f"{script} --site SITE --nodes {-(-world_size // per_host)} {shlex.quote(config)}{rest}"
