"""Settings of reports, wandb, TensorBoard and profiles, with their rules."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from megatron_sorted.settings.field import AllSettings, flag_of, setting
from megatron_sorted.settings.require import require


@dataclass(frozen=True)
class MonitoringSettings:
    """Reports, wandb, TensorBoard, timers and profiles, named as in Megatron-LM."""

    log_interval: int = setting(10, "Number of steps between reports.")
    metrics_file: str | None = setting(
        None, "File of JSON lines with every report; by default metrics.jsonl in --save."
    )
    tensorboard_dir: str | None = setting(
        None, "Directory for TensorBoard files; by default none are written."
    )
    wandb_project: str | None = setting(
        None, "Project of Weights & Biases; by default wandb is not used."
    )
    wandb_exp_name: str | None = setting(None, "Name of the run in wandb.")
    wandb_entity: str | None = setting(None, "User or team in wandb.")
    wandb_group: str | None = setting(None, "Group of the run in wandb.")
    wandb_save_dir: str | None = setting(
        None, "Directory of wandb's files; by default wandb in --save."
    )
    wandb_mode: Literal["online", "offline", "disabled"] = setting(
        "online",
        "Whether reports are sent to wandb (online), only written to files, which wandb sync "
        "sends later (offline), or dropped (disabled). WANDB_MODE overrides it.",
    )
    num_draft_tokens: int = setting(
        4,
        "Number of tokens that an exit drafts at a time in the simulated accept length of reports.",
    )
    device_peak_tflops: float | None = setting(
        None,
        "Peak TFLOP/s of one device at the run's precision, for MFU; by default the known value "
        "of common accelerators.",
    )
    log_timers: bool = setting(
        False, "Report the time of each phase of a step; this waits for the device between phases."
    )
    profile: bool = setting(False, "Record some steps with torch.profiler.")
    profile_step_start: int = setting(
        10, "First step that is recorded; the first step of a run is 1."
    )
    profile_step_end: int = setting(12, "First step that is no longer recorded.")
    profile_ranks: tuple[int, ...] = setting((0,), "Ranks whose steps are recorded.")
    profile_dir: str | None = setting(
        None, "Directory of the recordings; by default profile in --save."
    )


FORBIDDEN_IN_NAMES = r"/\#?%:"
"""Characters that names of projects of Weights & Biases cannot contain."""


def check_monitoring(settings: AllSettings) -> None:
    """Check that reports can be written where the settings say.

    Raises:
        SettingsError: They cannot.
    """
    _check_wandb(settings)
    require(
        settings.tensorboard_dir is None or find_spec("tensorboard") is not None,
        "--tensorboard-dir: the package tensorboard is not installed. Install it with `pip "
        "install tensorboard`, or leave the setting out.",
    )
    require(
        settings.metrics_file is None or not Path(settings.metrics_file).is_dir(),
        f"--metrics-file: {settings.metrics_file} is a directory. Give a file.",
    )


def _check_wandb(settings: AllSettings) -> None:
    project = settings.wandb_project
    if project is None:
        for name in ("wandb_exp_name", "wandb_entity", "wandb_group", "wandb_save_dir"):
            require(
                getattr(settings, name) is None,
                f"{flag_of(name)}: without --wandb-project nothing goes to Weights & Biases. Give "
                "that too, or leave this out.",
            )
        return
    require(
        0 < len(project) <= 128 and not set(project) & set(FORBIDDEN_IN_NAMES),
        f"--wandb-project: {project!r} cannot be a project's name. Give 1 to 128 characters "
        f"without {' '.join(FORBIDDEN_IN_NAMES)}",
    )


def check_profile(settings: AllSettings, world_size: int) -> None:
    """Check that a profile has steps, ranks and a directory.

    Raises:
        SettingsError: It does not.
    """
    if not settings.profile:
        return
    start, end = settings.profile_step_start, settings.profile_step_end
    require(
        end > max(start, 1),
        f"--profile-step-end: {end} is not above --profile-step-start {start}, so no step is "
        "recorded. Raise it.",
    )
    require(
        bool(settings.profile_ranks),
        "--profile-ranks: empty, so no rank records. Name a rank or leave --profile out.",
    )
    for rank in settings.profile_ranks:
        require(
            0 <= rank < world_size,
            f"--profile-ranks: {rank} is not one of the {world_size} processes. Use "
            f"0..{world_size - 1}.",
        )
    require(
        settings.profile_dir is not None or settings.save is not None,
        "--profile: nowhere to write. Give --profile-dir or --save, or leave it out.",
    )
