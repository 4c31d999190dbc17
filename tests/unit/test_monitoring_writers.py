"""Several writers as one, without a network: which are opened, and what their errors do."""

import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_sorted.errors import SettingsError
from megatron_sorted.monitoring.json_lines import read_json_lines
from megatron_sorted.monitoring.writers import open_writers
from megatron_sorted.settings.run import Settings
from tests.unit.test_monitoring_console import EVALUATION, STEP

SETTINGS = replace(Settings(), num_layers=8)


def open_logged(settings: Settings):
    logged = []
    return open_writers(settings, "id", 0, {}, logged.append), logged


@pytest.mark.parametrize("tensorboard", [False, True])
@pytest.mark.parametrize("json_lines", [False, True])
def test_each_alone_or_together(tmp_path, json_lines, tensorboard):
    settings = replace(
        SETTINGS,
        save=str(tmp_path / "save") if json_lines else None,
        tensorboard_dir=str(tmp_path / "tb") if tensorboard else None,
    )
    writers, logged = open_logged(settings)
    writers.write(STEP)
    writers.write(EVALUATION)
    writers.close()
    writers.close()  # a second time does nothing
    assert logged == []
    assert (
        sorted(path.name for path in tmp_path.iterdir())
        == ["save"] * json_lines + ["tb"] * tensorboard
    )
    if json_lines:
        assert [path.name for path in (tmp_path / "save").iterdir()] == ["metrics.jsonl"]
        assert [line["kind"] for line in read_json_lines(tmp_path / "save" / "metrics.jsonl")] == [
            "train",
            "evaluation",
        ]


def test_a_full_disk_is_logged_once_and_stops_nothing(tmp_path):
    writers, logged = open_logged(
        replace(SETTINGS, metrics_file="/dev/full", tensorboard_dir=str(tmp_path))
    )
    for _ in range(3):
        writers.write(STEP)
    assert logged == [
        "JSON lines: a report could not be written ([Errno 28] No space left on device). Training "
        "continues, and later reports are tried"
    ]
    writers.close()
    assert logged[1:] == ["JSON lines: 3 reports could not be written"]
    assert b"lm loss" in next(tmp_path.iterdir()).read_bytes()


def test_a_file_that_cannot_be_opened_ends_the_run_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="--metrics-file"):
        open_logged(replace(SETTINGS, save=str(tmp_path / "file")))


@pytest.mark.parametrize("how", ["setting", "environment"])
def test_disabled_wandb_writes_and_starts_nothing(tmp_path, monkeypatch, how):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if how == "environment":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    mode = "disabled" if how == "setting" else "online"
    monkeypatch.setattr(subprocess, "Popen", None)
    writers, logged = open_logged(
        replace(SETTINGS, save=str(tmp_path), wandb_project="p", wandb_mode=mode)
    )
    writers.write(STEP)
    writers.close()
    assert logged == [] and [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_nothing_heavy_is_imported():
    heavy = {"torch", "megatron", "numpy", "wandb", "tensorboard"}
    code = (
        f"import sys, megatron_sorted.monitoring.writers; print(sorted({heavy} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )
