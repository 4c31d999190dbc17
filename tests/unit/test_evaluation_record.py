"""Results of an evaluation are written after each measurement; older ones stay until the end."""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sorted.evaluation.output.record import Record
from tests.support.faults import interrupted


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Return a folder in memory, where there is such a file system."""
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    ) as folder:
        yield Path(folder)


def results(folder: Path, ending: str = "") -> dict:
    return json.loads((folder / f"evaluation{ending}.json").read_text())


def measured(folder: Path, number: int) -> None:
    """Measure a text and a set of questions."""
    record = Record(folder)
    record.keep({"run": number, "texts": 1}, {})
    record.keep({"run": number, "texts": 1, "questions": 1}, {"asked": f"{number}\n"})
    record.finish({"run": number, "texts": 1, "questions": 1}, {"asked": f"{number}\n"})


def test_measurements_are_kept_when_later_ones_fail(tmp_path):
    record = Record(tmp_path)
    assert record.kept is None
    record.keep({"texts": 1}, {})
    assert (
        results(tmp_path) == {"unfinished": True, "texts": 1}
        and record.kept == tmp_path / "evaluation.json"
    )
    again = Record(tmp_path)  # unfinished results are overwritten
    again.keep({"texts": 2}, {"asked": "x\n"})
    again.finish({"texts": 2}, {"asked": "x\n"})
    assert results(tmp_path) == {"texts": 2} and sorted(os.listdir(tmp_path)) == [
        "answers_asked.jsonl",
        "evaluation.json",
    ]


def test_finished_results_stay_until_the_new_ones_are_finished(tmp_path):
    def before() -> None:
        for path in tmp_path.iterdir():
            path.unlink()
        measured(tmp_path, 1)

    seen = set()
    for _ in interrupted(lambda: measured(tmp_path, 2), before):
        kept = results(tmp_path)
        seen.add(kept["run"])
        assert "unfinished" not in kept
    assert seen == {1, 2} and sorted(os.listdir(tmp_path)) == [
        "answers_asked.jsonl",
        "evaluation.json",
    ]
