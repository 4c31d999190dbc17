"""Rules between reports, Weights & Biases, TensorBoard and profiles."""

from importlib.util import find_spec
from pathlib import Path

from megatron_sorted.settings.flags import flag_of
from megatron_sorted.settings.require import require
from megatron_sorted.settings.run import Settings

NOT_IN_NAMES = r"/\#?%:"
"""Characters that names and directories of a project of Weights & Biases cannot have."""


def check_monitoring(settings: Settings, world_size: int) -> None:
    """Returns nothing if reports and profiles can be written where the settings say.

    Raises:
        SettingsError: they cannot.
    """
    _check_wandb(settings)
    require(
        settings.tensorboard_dir is None or find_spec("tensorboard") is not None,
        "--tensorboard-dir: the package tensorboard is not installed. Install it with `pip install tensorboard`, or leave the setting out.",
    )
    require(
        settings.metrics_file is None or not Path(settings.metrics_file).is_dir(),
        f"--metrics-file: {settings.metrics_file} is a directory. Give a file.",
    )
    if settings.profile:
        _check_profile(settings, world_size)


def _check_wandb(settings: Settings) -> None:
    project = settings.wandb_project
    if project is None:
        for name in ("wandb_exp_name", "wandb_entity", "wandb_group", "wandb_save_dir"):
            require(
                getattr(settings, name) is None,
                f"{flag_of(name)}: without --wandb-project nothing goes to Weights & Biases. Give that too, or leave this out.",
            )
        return
    require(
        0 < len(project) <= 128 and not set(project) & set(NOT_IN_NAMES),
        f"--wandb-project: {project!r} cannot be a project's name. Give 1 to 128 characters without {' '.join(NOT_IN_NAMES)}",
    )


def _check_profile(settings: Settings, world_size: int) -> None:
    first, end = settings.profile_step_start, settings.profile_step_end
    require(first < end, f"--profile-step-start: {first} is not below --profile-step-end {end}, the first step not recorded any more.")
    for rank in settings.profile_ranks:
        require(
            0 <= rank < world_size,
            f"--profile-ranks: {rank} is not a rank of {world_size} process{'es' * (world_size > 1)}. Use 0..{world_size - 1}.",
        )
    require(
        settings.profile_dir is not None or settings.save is not None,
        "--profile: nowhere to write the recordings. Give --profile-dir or --save.",
    )
