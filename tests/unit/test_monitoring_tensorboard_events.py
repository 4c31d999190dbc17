"""TensorBoard's files, read back with its own reader."""

import dataclasses
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sorted.errors import SettingsError
from megatron_sorted.monitoring.tensorboard_events import TensorBoard
from megatron_sorted.monitoring.values import metric_values
from tests.unit.test_monitoring_console import EVALUATION, STEP


def write(directory, resumed_step: int, reports) -> None:
    writer = TensorBoard(directory, last_depth=8, resumed_step=resumed_step)
    writer.start()
    for report in reports:
        writer.write(report)
    writer.close()


def read(directory) -> dict[str, list[tuple[int, float]]]:
    """Return {tag: [(step, value)]} as TensorBoard shows it."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_every_number_of_a_report_is_there(tmp_path):
    write(tmp_path / "new" / "tb", 0, [STEP, dataclasses.replace(STEP, step=30), EVALUATION])
    events = read(tmp_path / "new" / "tb")
    expected = metric_values(STEP, 8)
    both = metric_values(EVALUATION, 8, "facts")
    assert set(events) == set(expected) | set(both)
    for tag, value in expected.items():
        assert [step for step, _ in events[tag]] == [20, 30]
        assert all(read_value == pytest.approx(value, rel=1e-6) for _, read_value in events[tag]), (
            tag
        )  # scalars are float32
    for tag, value in both.items():
        assert events[tag] == [(20, pytest.approx(value, rel=1e-6))]


def test_a_resume_takes_back_what_came_after_the_checkpoint(tmp_path, monkeypatch):
    def reports(steps, rate):
        return [dataclasses.replace(STEP, step=step, learning_rate=rate) for step in steps]

    monkeypatch.setattr(
        "time.time", lambda: 1_000_000
    )  # files are read in the order of their names
    write(tmp_path, 0, reports(range(1, 10), 1.0))
    monkeypatch.setattr("time.time", lambda: 2_000_000)
    write(tmp_path, 6, reports(range(7, 9), 2.0))
    assert read(tmp_path)["learning-rate"] == [(step, 1.0) for step in range(1, 7)] + [
        (7, 2.0),
        (8, 2.0),
    ]


def test_neither_torch_nor_tensorflow_is_imported(tmp_path):
    code = f"""
import sys
from megatron_sorted.monitoring.tensorboard_events import TensorBoard
assert "tensorboard" not in sys.modules
TensorBoard({str(tmp_path)!r}, 8, 0).start()
print(sorted({{"torch", "tensorflow", "wandb"}} & set(sys.modules)))
"""
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SettingsError, match=r"--tensorboard-dir: cannot write in .*file/tb"):
        write(tmp_path / "file" / "tb", 0, [])


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(SettingsError, match="pip install tensorboard"):
        write(tmp_path, 0, [])
