"""Two spellings of one place are one place."""

import os

import pytest

from megatron_sorted.files import is_inside, same_path


@pytest.mark.parametrize(
    "spelling", ["runs/a", "runs/a/", "./runs/../runs/a", "link", "link/", "above/a", "{}/runs/a"]
)
def test_spellings_of_one_place(spelling, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs/a")
    os.symlink("runs/a", "link")
    os.symlink(tmp_path / "runs", "above")
    spelling = spelling.format(tmp_path)
    assert same_path(spelling, "runs/a") and same_path(tmp_path / "runs" / "a", spelling)
    assert (
        is_inside(spelling, "runs")
        and not same_path(spelling, "runs/b")
        and not same_path(spelling, None)
    )


def test_a_place_that_is_not_there_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert same_path("new/", tmp_path / "new") and not is_inside("new", "other")
