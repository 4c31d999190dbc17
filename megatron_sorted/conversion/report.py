"""Output of conversions: progress bars, a line about each model, comparisons as JSON."""

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
    """Show a progress bar of ``num_bytes`` and return the function that advances it."""
    bar = tqdm(total=num_bytes, desc=title, unit="B", unit_scale=True, leave=True)
    OPEN_BARS.append(bar)

    def advance(done: int) -> None:
        bar.update(done)
        if bar.n >= bar.total:
            bar.close()

    return advance


def end_bars() -> None:
    """Close the bars that an error left unfinished, so that its message gets a line of its own."""
    while OPEN_BARS:
        OPEN_BARS.pop().close()


def parse_size(text: str) -> int:
    """Return the number of bytes of a size such as 5GB.

    Raises:
        SettingsError: The text is no size.

    >>> parse_size("500MB")
    500000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)?", text.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise SettingsError(f"--max-shard-size: {text!r} is no size. Write it as 500MB or 5GB.")
    return max(1, int(float(match[1]) * UNITS[match[2] or ""]))


def describe(model: OpenModel) -> str:
    """Return a line about a model: kind, size and exits."""
    settings, depths = model.settings, exit_depths(model.settings)
    kind = "Hugging Face model" if model.kind == "hugging_face" else "checkpoint"
    exits = f"exits {' '.join(map(str, depths))}" if len(depths) > 1 else "one exit, the last layer"
    if own := part_names(settings):
        exits += f", each with {', '.join(own)} of its own"
    return (
        f"{model.directory}: {kind}, {settings.num_layers} layers, hidden {settings.hidden_size}, "
        f"vocabulary {settings.vocab_size}, {model.num_bytes / 1e6:,.1f} MB in "
        f"{len(model.source.tensors)} tensors, {exits}"
    )


def write_report(path: Path, comparison: Comparison) -> None:
    """Write a comparison, with every tensor and exit, as JSON."""
    rows = [{**asdict(row), "dtype": str(row.dtype)} for row in comparison.tensors]
    content = {
        "computed_by": comparison.computed_by,
        "tolerance": comparison.tolerance,
        "problems": comparison.problems,
        "exits": [asdict(row) for row in comparison.exits],
        "tensors": rows,
    }
    write_text_atomically(path, json.dumps(content, indent=1) + "\n")
