"""What a run reports, how often and to whom."""

from dataclasses import dataclass
from typing import Literal

from megatron_sorted.settings.field import setting


@dataclass(frozen=True)
class MonitoringSettings:
    """Reports, wandb, TensorBoard, timers and profiles, in Megatron-LM's words."""

    log_interval: int = setting(10, "Steps between reports.")
    metrics_file: str | None = setting(None, "JSON lines of every report; by default metrics.jsonl in --save.")
    tensorboard_dir: str | None = setting(None, "Directory for TensorBoard; by default none is written.")
    wandb_project: str | None = setting(None, "Project of Weights & Biases; by default it is not used.")
    wandb_exp_name: str | None = setting(None, "Name of the run there.")
    wandb_entity: str | None = setting(None, "User or team there.")
    wandb_group: str | None = setting(None, "Group of the run there.")
    wandb_save_dir: str | None = setting(None, "Directory of its files; by default wandb in --save.")
    wandb_mode: Literal["online", "offline", "disabled"] = setting(
        "online", "Whether reports are sent, only written (wandb sync sends them later), or dropped. WANDB_MODE overrides it.")
    num_draft_tokens: int = setting(4, "Tokens an exit drafts at a time in the simulated accept length of reports.")
    device_peak_tflops: float | None = setting(
        None, "Peak TFLOP/s of one device at the run's precision, for MFU; by default known for common accelerators.")
    log_timers: bool = setting(False, "Report the time of each phase of a step; waits for the device between phases.")
    profile: bool = setting(False, "Record some steps with torch.profiler.")
    profile_step_start: int = setting(10, "First step recorded; the first of a run is 1.")
    profile_step_end: int = setting(12, "First step not recorded any more.")
    profile_ranks: tuple[int, ...] = setting((0,), "Ranks that record.")
    profile_dir: str | None = setting(None, "Directory of the recordings; by default profile in --save.")
