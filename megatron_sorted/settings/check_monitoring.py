"""Rules between reports, Weights & Biases and TensorBoard."""

from importlib.util import find_spec
from pathlib import Path

from megatron_sorted.settings.flags import flag_of
from megatron_sorted.settings.require import require
from megatron_sorted.settings.run import Settings

NOT_IN_NAMES = r"/\#?%:"
"""Characters that names and directories of a project of Weights & Biases cannot have."""


def check_monitoring(settings: Settings) -> None:
    """Returns nothing if reports can be written where the settings say.

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
