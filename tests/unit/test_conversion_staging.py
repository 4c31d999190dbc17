"""Directories that --overwrite does not replace."""

import pytest

from megatron_sorted.conversion.staging import staged_directory
from megatron_sorted.errors import CheckpointError


def overwrite(destination, source=None) -> None:
    with staged_directory(destination, True, 10, source) as staged:
        (staged / "new").write_text("")


def test_overwrite_spares_the_source_and_directories_around_it(tmp_path):
    source = tmp_path / "models" / "llama"
    source.mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(source)
    for destination in (source, tmp_path / "models", tmp_path / "link", source / ".." / "llama"):
        with pytest.raises(
            CheckpointError,
            match=r"--overwrite would replace .*, the model to convert\. Give another directory",
        ):
            overwrite(destination, source)
    assert (source / "config.json").exists()
    overwrite(source / "exported", source)  # a new directory inside is no replacement
    overwrite(source / "exported", source)


def test_overwrite_spares_the_checkpoints_of_a_run(tmp_path):
    (tmp_path / "run" / "iter_0000000").mkdir(parents=True)
    overwrite(tmp_path / "run")  # an import alone
    (tmp_path / "run" / "iter_0000020").mkdir(parents=True)
    with pytest.raises(
        CheckpointError,
        match="holds checkpoints of a run up to step 20, which --overwrite does not replace",
    ):
        overwrite(tmp_path / "run")
