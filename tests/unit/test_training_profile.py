"""The steps that are recorded, the files, and that a failure ends only the recording."""

import gzip
import json

import pytest
import torch

from megatron_sorted.training.watch.profile import Profiler
from tests.support.tiny import tiny


def run(directory, rank=0, first=0, last=8, **changes) -> list[str]:
    """Train steps first+1..last with a profiler; return the lines it logged."""
    logged = []
    settings = tiny(
        **{
            "profile": True,
            "profile_step_start": 3,
            "profile_step_end": 5,
            "profile_ranks": (0, 2),
            **changes,
        }
    )
    profiler = Profiler(settings, rank, directory, logged.append)
    profiler.step(first)
    for done in range(first + 1, last + 1):
        with torch.profiler.record_function(f"our step {done}"):
            torch.ones(20, 20) @ torch.ones(20, 20)
        profiler.step(done)
    profiler.close()
    return logged


def recorded(path) -> set[str]:
    """Return the steps in a trace."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return {event["name"] for event in events if str(event.get("name", "")).startswith("our step")}


@pytest.mark.parametrize(("first", "last", "changes", "name", "steps"), [
    (0, 8, {}, "3-4", {3, 4}),
    (0, 3, {}, "3-3", {3}),  # the run ends before
    (3, 8, {}, "4-4", {4}),  # a resume in between
    (0, 8, {"profile_step_start": 0, "profile_step_end": 3}, "1-2", {1, 2}),
])  # fmt: skip
def test_steps_are_recorded_as_reports_number_them(tmp_path, first, last, changes, name, steps):
    [logged] = run(tmp_path / "profile", 2, first, last, **changes)
    stem = tmp_path / "profile" / f"rank_2_steps_{name}"
    assert recorded(stem.with_suffix(".json.gz")) == {f"our step {step}" for step in steps}
    assert "aten::mm" in stem.with_suffix(".txt").read_text() and str(stem) in logged
    assert len(list((tmp_path / "profile").iterdir())) == 2


@pytest.mark.parametrize(
    ("rank", "first", "changes"), [(1, 0, {}), (0, 4, {}), (0, 0, {"profile": False})]
)
def test_others_and_later_steps_are_not_recorded(tmp_path, rank, first, changes):
    assert (
        run(tmp_path / "profile", rank, first, **changes) == []
        and not (tmp_path / "profile").exists()
    )


def test_trouble_ends_the_recording_and_not_the_run(tmp_path):
    (tmp_path / "profile").write_text("a file where the directory should be")
    [logged] = run(tmp_path / "profile")
    assert logged.startswith("profile: given up, training continues: FileExistsError")
    assert run(None) == []
