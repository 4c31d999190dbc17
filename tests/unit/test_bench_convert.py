"""The measurement of conversions: sizes, ratios, verdicts, the page, and a tiny model."""

import json

import pytest

from lab.bench_convert import QUICK, ROUNDS, SHAPES
from lab.benchmarks.convert_model import write_model
from lab.benchmarks.convert_page import model_row, verdicts, write_convert_page
from lab.benchmarks.convert_worker import copy_plainly, weight_files
from megatron_sorted.conversion.open_model import open_model


def entry(seconds: float, plain: float, **verified: float) -> dict:
    """Return one round, the same for both directions."""
    run = {
        "seconds": seconds,
        "imported_bytes": 300_000_000,
        "peak_bytes": 450_000_000,
        "load": 1.0,
        **verified,
    }
    return {
        "import": run,
        "export": run,
        "plain beside import": {"seconds": plain, "bytes": 1000, "load": 1.0},
        "plain beside export": {"seconds": plain, "bytes": 1000, "load": 1.0},
    }


def model(peak: int) -> dict:
    return {
        "bytes": 2_200_000_000,
        "largest_bytes": 131_000_000,
        "rounds": [
            entry(12.0, 10.0, verify_seconds=20.0, verify_peak_bytes=peak),
            entry(9.0, 10.0),
            entry(30.0, 15.0),
        ],
    }


def test_ratios_are_of_one_round_and_peaks_of_all():
    row = model_row(model(600_000_000))
    assert row["bound_bytes"] == 862_000_000
    assert (
        row["import"]
        == row["export"]
        == {
            "seconds": 12.0,
            "plain_seconds": 10.0,
            "ratio": pytest.approx(1.2),
            "start_bytes": 300_000_000,
            "peak_bytes": 450_000_000,
            "verify_seconds": 20.0,
            "verify_peak_bytes": 600_000_000,
        }
    )


def test_targets_hold_or_do_not():
    time, memory, flat = verdicts(
        {"a": model_row(model(600_000_000)), "b": model_row(model(620_000_000))}
    ).values()
    assert time and memory and flat
    time, memory, flat = verdicts(
        {"a": model_row(model(600_000_000)), "b": model_row(model(900_000_000))}
    ).values()
    assert time and not memory and not flat


def test_the_page_is_written(tmp_path):
    text = write_convert_page({"22 layers": model(600_000_000)}, tmp_path, {"date": "today"})
    assert (tmp_path / "convert.md").read_text() == text
    assert "\n\n> **What this is for**: what conversions cost in time and memory." in text
    assert "| 22 layers | import | 2,200 | 12.0 | 10.0 | 1.20 | 3 | 20.0 |" in text
    assert "| 22 layers | export | 300 | 450 | 600 | 131 | 862 |" in text
    assert "- holds: peak memory does not grow with the model" in text
    assert (
        json.loads((tmp_path / "convert.json").read_text())["runs"]["22 layers"]["rounds"][2][
            "import"
        ]["seconds"]
        == 30.0
    )


def test_models_are_as_large_as_they_are_to_be():
    small, deep = SHAPES.values()
    assert (
        ROUNDS.keys() == SHAPES.keys()
        and small.num_bytes > 2e9
        and deep.num_layers == 2 * small.num_layers
    )
    assert small.largest_bytes == deep.largest_bytes == 2 * 32000 * 2048


def test_a_made_model_is_one_and_its_bytes_are_copied_plainly(tmp_path):
    shape = next(iter(QUICK.values()))
    write_model(tmp_path / "model", shape)
    opened = open_model(tmp_path / "model")
    assert opened.num_bytes == shape.num_bytes and opened.settings.num_layers == shape.num_layers
    result = copy_plainly(tmp_path / "model", tmp_path / "plain")
    (one,), (other,) = weight_files(tmp_path / "model"), weight_files(tmp_path / "plain")
    assert (
        other.read_bytes() == one.read_bytes()
        and result["bytes"] == one.stat().st_size
        and result["seconds"] > 0
    )
