"""Names in the checkpoint directory, and which checkpoints are kept."""

import os

import pytest

from megatron_sorted.checkpoint.layout import (
    TRACKER,
    iteration_directory,
    saved_steps,
    steps_to_remove,
    writing_directory,
)
from megatron_sorted.checkpoint.publishing import remove_checkpoint, remove_leftovers
from megatron_sorted.files import write_text_atomically


def test_names_sort_by_step_and_take_long_runs(tmp_path):
    assert iteration_directory("save", 42).as_posix() == "save/iter_0000042"
    assert iteration_directory(tmp_path, 12345678).name == "iter_12345678"


def test_a_file_is_replaced_at_once(tmp_path):
    path = tmp_path / TRACKER
    path.write_text("a longer text than the new one")
    with open(path, encoding="utf-8") as reader:
        write_text_atomically(path, "200")
        assert (
            reader.read() == "a longer text than the new one"
        )  # whoever reads the old file reads all of it
    assert path.read_text() == "200" and os.listdir(tmp_path) == [TRACKER]


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path):
    (tmp_path / TRACKER).mkdir()
    with pytest.raises(OSError):
        write_text_atomically(tmp_path / TRACKER, "200")
    assert os.listdir(tmp_path) == [TRACKER]


def test_only_finished_directories_are_checkpoints(tmp_path):
    for name in (
        "iter_0000003",
        "iter_0000020",
        "iter_12345678",
        ".iter_0000021.writing",
        ".iter_0000002.removing",
        "iter_5",
        "release",
    ):
        (tmp_path / name).mkdir()
    assert saved_steps(tmp_path) == [12345678, 20, 3]
    assert saved_steps(tmp_path / "missing") == []
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        "iter_0000003",
        "iter_0000020",
        "iter_12345678",
        "iter_5",
        "release",
    ]


def test_a_removed_checkpoint_disappears_at_once(tmp_path):
    directory = iteration_directory(tmp_path, 5)
    (directory / "tokenizer").mkdir(parents=True)
    (tmp_path / ".iter_0000005.removing").mkdir()  # of a run killed while it removed the same step
    remove_checkpoint(tmp_path, 5)
    assert os.listdir(tmp_path) == []
    assert writing_directory(tmp_path, 5).name == ".iter_0000005.writing"


@pytest.mark.parametrize(
    ("steps", "newest", "retain", "interval", "removed"),
    [
        ([50, 40, 30, 20, 10], 50, None, None, []),
        ([50, 40, 30, 20, 10], 50, 2, None, [30, 20, 10]),
        ([50, 40, 30, 20, 10], 50, 2, 20, [30, 10]),
        ([50, 40, 30, 20, 10], 50, 1, 1, []),
        ([50, 40], 50, 3, None, []),
        (
            [90, 80, 30, 20],
            30,
            2,
            None,
            [90, 80],
        ),  # 80 and 90 are of a run that was started over: they go first
        ([90, 80, 30, 20], 30, 1, None, [20, 90, 80]),
    ],
)
def test_the_last_n_and_every_mth_are_kept(steps, newest, retain, interval, removed):
    assert steps_to_remove(steps, newest, retain, interval) == removed
