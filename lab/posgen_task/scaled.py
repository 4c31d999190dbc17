"""Trained models read with YaRN: the same weights, other rotary frequencies.

    python -m lab.posgen_task.scaled --factor 4 MODEL:64:NEW ...

PosGen trains with plain (or rounded) frequencies and scales them only where longer sequences are
read, as the paper's code does.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_sorted.conversion.exporting import write_config
from megatron_sorted.conversion.hugging_face.config_settings import (
    config_of_settings,
    settings_of_config,
)
from megatron_sorted.conversion.hugging_face.families import CONFIG_FILE, read_config
from megatron_sorted.conversion.staging import staged_directory
from megatron_sorted.settings.rope import check_rope

BETA_FAST = 2.0
"""The value of the paper's code for PosGen; YaRN's own default is 32."""


def write_scaled(model: Path, new: Path, factor: float, original: int) -> None:
    """Write a copy of a Hugging Face directory whose rotary frequencies are scaled by YaRN.

    Raises:
        CheckpointError: It cannot be read, or names another scaling.
        SettingsError: The scaling is not possible.
    """
    config = read_config(model)
    trained = settings_of_config(config, str(model / CONFIG_FILE))
    settings = replace(
        trained,
        rope_scaling_type="yarn",
        rope_scaling_factor=factor,
        rope_scaling_original_max_position_embeddings=original,
        rope_scaling_beta_fast=BETA_FAST,
        max_position_embeddings=int(trained.max_position_embeddings * factor),
    )
    check_rope(settings)
    with staged_directory(new, True, sum(path.stat().st_size for path in model.iterdir())) as made:
        for path in model.iterdir():
            shutil.copyfile(path, made / path.name)
        write_config(made, config_of_settings(settings, "float32", config))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the directories."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--factor", type=float, required=True, help="of YaRN")
    parser.add_argument(
        "copies", nargs="+", metavar="MODEL:ORIGINAL:NEW", help="ORIGINAL: YaRN's original context"
    )
    values = parser.parse_args(arguments)
    for copy in values.copies:
        model, original, new = copy.split(":")
        write_scaled(Path(model), Path(new), values.factor, int(original))


if __name__ == "__main__":
    run_main(main)
