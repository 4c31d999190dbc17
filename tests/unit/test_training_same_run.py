"""The same command started again resumes from --save, unless it holds another run."""

import dataclasses
import os
from pathlib import Path

import pytest

from megatron_sorted.checkpoint.manifest import (
    MANIFEST,
    Progress,
    manifest_text,
    read_manifest,
    record_file,
)
from megatron_sorted.conversion.starting_settings import starting_settings
from megatron_sorted.errors import CheckpointError
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.hugging_face import check_export_of_run
from megatron_sorted.training.run.inputs import newest_of, open_inputs
from megatron_sorted.training.run.same_run import STARTED_FROM, start_of
from tests.unit.test_training_inputs import folder, prepared, settings, write_checkpoint

__all__ = ("folder", "prepared")  # fixtures


def changed(directory: Path, **entries: object) -> Path:
    """Give a checkpoint's manifest other entries; None removes one."""
    manifest = {**read_manifest(directory), **entries}
    progress, files = manifest.pop("progress"), list(manifest.pop("files"))
    described = {
        name: value
        for name, value in manifest.items()
        if name not in ("format", "sha256") and value is not None
    }
    (directory / MANIFEST).write_text(
        manifest_text(
            described, Progress(**progress), {name: record_file(directory / name) for name in files}
        )
    )
    return directory


@pytest.fixture
def run(folder) -> Settings:
    """Return a run that takes weights of ``theirs`` and saves into ``own``."""
    changed(
        write_checkpoint(folder / "theirs", settings(folder)), run_id="theirs", contents="weights"
    )
    return settings(folder, load=str(folder / "theirs"), save=str(folder / "own"))


def save(run: Settings, step: int, start: str | None, **entries: object) -> Path:
    """Write a checkpoint of a run."""
    return changed(write_checkpoint(Path(run.save), run, step), **{STARTED_FROM: start, **entries})


@pytest.mark.parametrize("start_from", ["load", "finetune", "pretrained", "nothing"])
def test_the_same_command_resumes_from_what_it_saved(run, start_from, monkeypatch):
    changes = {
        "load": {},
        "finetune": {"finetune": True},
        "nothing": {"load": None},
        "pretrained": {"load": None, "pretrained_checkpoint": run.load},
    }[start_from]
    run = dataclasses.replace(run, **changes)
    first = open_inputs(run)
    assert first.resume_lines == () and first.settings.load == (
        None if start_from == "nothing" else str(Path(run.save).parent / "theirs")
    )
    start = start_of(first.settings, newest_of(first.checkpoints))
    assert start == (
        "weights drawn with seed 1234" if start_from == "nothing" else "weights of run theirs"
    )
    directory = save(run, 3, start)
    for spelled in (run.save, os.path.relpath(run.save) + "/"):
        again = open_inputs(dataclasses.replace(run, save=spelled))
        assert again.checkpoints.usable[0].step == 3 and again.checkpoints.usable[
            0
        ].directory.samefile(directory)
        assert (again.settings.load, again.settings.finetune, again.settings.ckpt_step) == (
            spelled,
            False,
            None,
        )
        assert again.resume_lines[0].startswith(
            f"--save {spelled} holds checkpoints of this run up to step 3: resuming from them"
        )


def test_checkpoints_of_another_run_are_refused(run):
    save(run, 3, "weights of run others")
    with pytest.raises(
        CheckpointError,
        match=r"own holds checkpoints up to step 3 of another run: it started from weights of run "
        r"others, "
        "this one from weights of run theirs. Give another directory, or resume",
    ):
        open_inputs(run)
    with pytest.raises(
        CheckpointError, match=r"of another run: .* this one from weights drawn with seed 1234"
    ):
        open_inputs(dataclasses.replace(run, load=None))
    with pytest.raises(
        CheckpointError, match="holds checkpoints up to step 3 of another run"
    ):  # each start would begin anew in it
        open_inputs(dataclasses.replace(run, load=run.save, finetune=True))
    open_inputs(dataclasses.replace(run, load=run.save))  # as the message says


def test_an_older_version_did_not_record_what_a_run_started_from(run):
    save(run, 3, None)
    again = open_inputs(run)
    assert (
        again.settings.load == run.save and "an older version saved them" in again.resume_lines[1]
    )


def test_a_checkpoint_that_does_not_fit_is_refused(run):
    save(dataclasses.replace(run, hidden_size=64), 3, "weights of run theirs")
    with pytest.raises(
        CheckpointError,
        match=r"--save: .*own holds checkpoints from which this run cannot resume: "
        r".*--hidden-size: 64 in",
    ):
        open_inputs(run)


def test_damaged_ones_and_imports_over_a_run_are_not_replaced(run):
    directory = save(run, 3, "weights of run theirs")
    (directory / ".metadata").write_text("")
    with pytest.raises(
        CheckpointError,
        match=r"that this run would replace and cannot resume from: .*\.metadata: 0 bytes where",
    ):
        open_inputs(run)
    changed(write_checkpoint(Path(run.save), run, 0), contents="weights", saved_at="2999")
    with pytest.raises(CheckpointError, match="that this run would replace"):
        open_inputs(run)


def test_an_import_in_the_save_folder_is_no_run(run):
    changed(write_checkpoint(Path(run.save), run, 0), contents="weights")
    assert open_inputs(run).settings.load == run.load


def test_a_run_resumed_in_another_directory_takes_the_newer_checkpoint(run, folder):
    saved = {"run_id": "same"}
    theirs = changed(write_checkpoint(folder / "before", run, 5), **saved, saved_at="2026-01-05")
    run = dataclasses.replace(run, load=str(folder / "before"))
    assert open_inputs(run).checkpoints.usable[0].directory == theirs
    save(run, 8, None, **saved, saved_at="2026-01-08")
    again = open_inputs(run)
    assert (
        again.checkpoints.usable[0].step == 8
        and "resuming from them, not from --load" in again.resume_lines[0]
    )
    changed(theirs, saved_at="2026-01-09")  # trained on since
    assert open_inputs(run).checkpoints.usable[0].directory == theirs
    changed(theirs, run_id="other")
    with pytest.raises(CheckpointError, match="of run same, and --load names run other"):
        open_inputs(run)


def test_a_run_that_does_not_save_ignores_the_save_directory(run):
    save(run, 3, "weights of run others")
    assert open_inputs(dataclasses.replace(run, skip_train=True)).settings.load == run.load


def test_a_checkpoint_brings_the_tokenizer_that_lies_in_it(run):
    directory = save(
        run, 3, None, tokenizer={"type": "SentencePieceTokenizer", "name": "t.model", "sha256": "0"}
    )
    given = {"load": run.save, "use_checkpoint_args": True}
    assert "tokenizer_model" not in starting_settings(given)  # none lies there
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "tokenizer.model").write_bytes(b"")
    started = starting_settings(given)
    assert started["tokenizer_model"] == str(directory / "tokenizer" / "tokenizer.model")
    assert started["tokenizer_type"] == "SentencePieceTokenizer" and started["num_layers"] == 4
    assert "tokenizer_model" not in starting_settings({**given, "tokenizer_model": "mine"})


def test_an_export_of_another_run_is_not_replaced(tmp_path):
    export = dataclasses.replace(Settings(), save_hf=str(tmp_path))
    check_export_of_run(export, "mine")
    (tmp_path / "export.json").write_text('{"run_id": "mine", "step": 3}')
    check_export_of_run(export, "mine")
    for text in ('{"run_id": "other"}', "[]", "[" * 100_000):
        (tmp_path / "export.json").write_text(text)
        with pytest.raises(
            CheckpointError,
            match=r"--save-hf: .* holds the export of run (other|unknown), this one is run mine",
        ):
            check_export_of_run(export, "mine")


def test_imported_weights_at_step_0_are_not_trained_over(run):
    save(run, 0, None, contents="weights")
    fresh = dataclasses.replace(run, load=None)
    with pytest.raises(
        CheckpointError, match=r"--save: .*own holds weights at step 0, .* Give --load .*own"
    ):
        open_inputs(fresh)
