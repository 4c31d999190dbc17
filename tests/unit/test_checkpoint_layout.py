"""Names and words of the checkpoint directory."""

import json
import os

import pytest

from megatron_sorted.checkpoint.layout import (
    TRACKER,
    check_same_shape,
    iteration_directory,
    latest_checkpoint,
    read_description,
    write_text_atomically,
)
from megatron_sorted.errors import CheckpointError
from megatron_sorted.settings.run import Settings


def test_names_sort_by_step_and_take_long_runs(tmp_path):
    assert iteration_directory("save", 42).as_posix() == "save/iter_0000042"
    assert iteration_directory(tmp_path, 12345678).name == "iter_12345678"


def test_a_file_is_replaced_at_once(tmp_path):
    path = tmp_path / TRACKER
    path.write_text("a longer text than the new one")
    with open(path, encoding="utf-8") as reader:
        write_text_atomically(path, "200")
        assert reader.read() == "a longer text than the new one"  # whoever reads the old file reads all of it
    assert path.read_text() == "200" and os.listdir(tmp_path) == [TRACKER]


def test_the_tracker_decides_not_the_newest_directory(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (100, 200):
        directory = tmp_path / f"iter_{step:07d}"
        directory.mkdir()
        for name in ("run.json", "metadata.json", ".metadata"):
            (directory / name).write_text("{}")
    (tmp_path / TRACKER).write_text("100\n")
    assert latest_checkpoint(str(tmp_path)) == tmp_path / "iter_0000100"


@pytest.mark.parametrize("name", ["run.json", "metadata.json", ".metadata"])
def test_an_incomplete_checkpoint_is_refused_by_the_file_it_lacks(tmp_path, name):
    directory = tmp_path / "iter_0000100"
    directory.mkdir()
    for other in {"run.json", "metadata.json", ".metadata"} - {name}:
        (directory / other).write_text("{}")
    (tmp_path / TRACKER).write_text("100")
    with pytest.raises(CheckpointError) as error:
        latest_checkpoint(tmp_path)
    tracker = tmp_path / TRACKER
    assert str(error.value) == (
        f"{directory}: {name} is missing, so the checkpoint that {tracker} names is incomplete. "
        f"Write the number of a complete checkpoint into {tracker}, or restore the directory.")


@pytest.mark.parametrize("text", ["", "release", "-3", "1.5"])
def test_a_tracker_without_a_number(tmp_path, text):
    (tmp_path / TRACKER).write_text(text)
    with pytest.raises(CheckpointError, match="is not an iteration number"):
        latest_checkpoint(tmp_path)


def test_a_damaged_description_is_named(tmp_path):
    (tmp_path / "run.json").write_text('{"shape": ')
    with pytest.raises(CheckpointError) as error:
        read_description(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'run.json'}: not readable (Expecting value")


def test_exits_count_only_where_they_own_parameters(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"shape": {"exit_layer_nums": [2, 4]}}))
    check_same_shape(tmp_path, Settings(), {"exit_layer_nums": [1, 4]})
    with pytest.raises(CheckpointError, match=r"--exit-layer-nums: \[2, 4\] in the checkpoint, \[1, 4\] in this run\. "):
        check_same_shape(tmp_path, Settings(untie_exit_output_weights=True), {"exit_layer_nums": [1, 4]})
