"""What a terminal and a report show of a conversion: bars, a line about each model, every comparison as JSON."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from megatron_sorted.conversion.hugging_face.model_card import part_names
from megatron_sorted.conversion.open_model import OpenModel
from megatron_sorted.conversion.verifying.comparison import Comparison
from megatron_sorted.errors import SettingsError
from megatron_sorted.files import write_text_atomically
from megatron_sorted.settings.derived import exit_depths

OPEN_BARS: list[tqdm] = []

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def progress_bars(title: str, num_bytes: int) -> Callable[[int], None]:
    """Return what moves a bar of ``num_bytes`` on."""
    bar = tqdm(total=num_bytes, desc=title, unit="B", unit_scale=True, leave=True)
    OPEN_BARS.append(bar)

    def move(done: int) -> None:
        bar.update(done)
        if bar.n >= bar.total:
            bar.close()

    return move


def end_bars() -> None:
    """End the lines of bars that an error left unfinished, so that it stands on a line of its own."""
    while OPEN_BARS:
        OPEN_BARS.pop().close()


def parse_size(word: str) -> int:
    """Return the bytes of a size such as 5GB.

    Raises:
        SettingsError: It is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)?", word.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise SettingsError(f"--max-shard-size: {word!r} is no size. Write it as 500MB or 5GB.")
    return max(1, int(float(match[1]) * UNITS[match[2] or ""]))


def describe(model: OpenModel) -> str:
    """Return one line about a model."""
    settings, depths = model.settings, exit_depths(model.settings)
    kind = "Hugging Face model" if model.kind == "hugging_face" else "checkpoint"
    exits = f"exits {' '.join(map(str, depths))}" if len(depths) > 1 else "one exit, the last layer"
    if own := part_names(settings):
        exits += f", each with {', '.join(own)} of its own"
    return (
        f"{model.directory}: {kind}, {settings.num_layers} layers, hidden {settings.hidden_size}, vocabulary {settings.vocab_size}, "
        f"{model.num_bytes / 1e6:,.1f} MB in {len(model.source.tensors)} tensors, {exits}"
    )


def write_report(path: Path, comparison: Comparison) -> None:
    """Write every tensor and exit of a comparison as JSON."""
    rows = [{**asdict(row), "dtype": str(row.dtype)} for row in comparison.tensors]
    content = {
        "computed_by": comparison.computed_by,
        "tolerance": comparison.tolerance,
        "problems": comparison.problems,
        "exits": [asdict(row) for row in comparison.exits],
        "tensors": rows,
    }
    write_text_atomically(path, json.dumps(content, indent=1) + "\n")
