"""A kill, and a fault, at every place that renames, removes or replaces a user's files.

Nothing is lost.

`make test-faults` repeats all of these a hundred times (tests/faults).
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_sorted import files
from megatron_sorted.checkpoint.candidates import find_candidates
from megatron_sorted.checkpoint.layout import TRACKER, iteration_directory, writing_directory
from megatron_sorted.checkpoint.manifest import (
    MANIFEST,
    Progress,
    find_damage,
    manifest_text,
    record_file,
)
from megatron_sorted.checkpoint.publishing import Retention, publish, remove_leftovers
from megatron_sorted.conversion.staging import staged_directory
from megatron_sorted.data.indexed import Documents, IndexedWriter, open_indexed
from megatron_sorted.data.preparation.replacing import finish_interrupted
from megatron_sorted.errors import CheckpointError
from megatron_sorted.monitoring.json_lines import JsonLines, read_json_lines
from tests.support.faults import interrupted

RUN = "run-a"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Return a folder in memory, if there is such a file system.

    Some thousand waits for a disk would take minutes.
    """
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def written(directory: Path, step: int, content: bytes, saved_at: str, run_id: str = RUN) -> str:
    """Write a checkpoint's files but its manifest, whose text is returned."""
    directory.mkdir(parents=True)
    (directory / "__0_0.distcp").write_bytes(content)
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "t.model").write_bytes(b"words")
    names = ("__0_0.distcp", "tokenizer/t.model")
    return manifest_text(
        {"run_id": run_id, "saved_at": saved_at},
        Progress(step, 8 * step),
        {name: record_file(directory / name) for name in names},
    )


def checkpoint(
    root: Path, step: int, content: bytes, saved_at: str = "2026-01-01", run_id: str = RUN
) -> Path:
    """Return a finished checkpoint."""
    directory = iteration_directory(root, step)
    text = written(directory, step, content, saved_at, run_id)
    (directory / MANIFEST).write_text(text)
    return directory


def content_of_newest(root: Path) -> tuple[int, bytes]:
    """Return step and shard of the checkpoint that a resume would use, after verifying hashes."""
    newest = find_candidates(root).usable[0]
    assert find_damage(newest.directory, newest.manifest, newest.manifest["files"]) == []
    return newest.step, (newest.directory / "__0_0.distcp").read_bytes()


def fresh(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()


def save(root: Path, step: int, keep: Retention = Retention()) -> None:  # noqa: B008 - frozen
    """Do what a saver does on its first rank."""
    text = written(writing_directory(root, step), step, b"new", "2026-01-02")
    publish(root, step, text, RUN, keep)


@pytest.fixture(params=[True, False], ids=["names are swapped", "names cannot be swapped"])
def swaps(request, monkeypatch) -> bool:
    """Return whether the file system can exchange two names.

    To imitate one that cannot, such as NFS, the call receives unknown flags.
    """
    if not request.param:
        monkeypatch.setattr(files, "RENAME_EXCHANGE", 1 << 20)  # EINVAL
    return request.param


@pytest.mark.parametrize("kills", [True, False], ids=["kill", "fault"])
@pytest.mark.parametrize("step", [20, 30], ids=["the same step again", "a new step"])
def test_a_save(tmp_path, step, kills, swaps):
    root = tmp_path / "save"

    def before() -> None:
        fresh(root)
        checkpoint(root, 10, b"ten")
        checkpoint(root, 20, b"old")
        (root / TRACKER).write_text("20")

    seen = set()
    for _ in interrupted(lambda: save(root, step), before, kills):
        newest = content_of_newest(root)
        seen.add(newest)
        assert newest in {(20, b"old"), (step, b"new")}
        remove_leftovers(root)  # the next run
        assert content_of_newest(root) == newest and sorted(names(root))[:2] == [
            "iter_0000010",
            "iter_0000020",
        ]
        assert not any(name.startswith(".") for name in names(root))
    assert (20, b"old") in seen and (step, b"new") in seen


def names(root: Path) -> list[str]:
    return sorted(os.listdir(root))


@pytest.mark.parametrize("kills", [True, False], ids=["kill", "fault"])
def test_a_save_that_removes_older_ones(tmp_path, kills):
    """Only the run's own complete checkpoints count and are removed.

    A copy, another run's, or a damaged one does not.
    """
    root = tmp_path / "save"

    def before() -> None:
        fresh(root)
        for step in (10, 20, 30):
            checkpoint(root, step, b"%d" % step)
        checkpoint(root, 5, b"theirs", run_id="run-b")
        shutil.copytree(iteration_directory(root, 10), iteration_directory(root, 99))
        checkpoint(root, 7, b"damaged")
        (iteration_directory(root, 7) / "__0_0.distcp").write_bytes(b"")

    kept = {"iter_0000005", "iter_0000007", "iter_0000099", "iter_0000030"}
    for _ in interrupted(lambda: save(root, 40, Retention(retain=2)), before, kills):
        assert content_of_newest(root) in {(30, b"30"), (40, b"new")}
        assert kept <= set(names(root))
        remove_leftovers(root)
    before()
    save(root, 40, Retention(retain=2))
    assert set(names(root)) == {*kept, "iter_0000040", TRACKER}


@pytest.mark.parametrize("step", [20, 30], ids=["replaced", "retained no longer"])
def test_a_checkpoint_that_is_a_link(tmp_path, step, swaps):
    root, elsewhere = tmp_path / "save", tmp_path / "elsewhere"

    def before() -> None:
        fresh(root)
        fresh(elsewhere)
        checkpoint(root, 10, b"ten")
        old = checkpoint(root, 20, b"old")
        old.rename(elsewhere / "kept")
        old.symlink_to(elsewhere / "kept")

    for _ in interrupted(lambda: save(root, step, Retention(retain=1)), before):
        assert content_of_newest(root) in {(20, b"old"), (step, b"new")}
        assert (elsewhere / "kept" / "__0_0.distcp").read_bytes() == b"old"
        remove_leftovers(root)
        assert not any(name.startswith(".") for name in names(root))
    before()
    text = written(writing_directory(root, step), step, b"new", "2026-01-02")
    notes = publish(root, step, text, RUN, Retention(retain=1))
    assert [
        note
        for note in notes
        if "was a link: the link was removed" in note and str(elsewhere / "kept") in note
    ]
    assert (
        names(root) == [f"iter_{step:07d}", TRACKER] and (elsewhere / "kept" / MANIFEST).is_file()
    )


def test_a_failed_deletion_does_not_fail_the_save(tmp_path, swaps, monkeypatch):
    root = tmp_path / "save"
    root.mkdir()
    checkpoint(root, 20, b"old")
    monkeypatch.setattr(shutil, "rmtree", refuse)  # as a file that another host holds open on NFS
    notes = publish(
        root, 20, written(writing_directory(root, 20), 20, b"new", "2026-01-02"), RUN, Retention()
    )
    assert (
        content_of_newest(root) == (20, b"new")
        and "could not be deleted (Device or resource busy)" in notes[0]
    )


def refuse(path, ignore_errors=False, **_options) -> None:
    if not ignore_errors:
        raise OSError(16, "Device or resource busy", str(path))


@pytest.mark.parametrize("kills", [True, False], ids=["kill", "fault"])
@pytest.mark.parametrize("is_link", [False, True])
def test_a_file(tmp_path, kills, is_link):
    folder = tmp_path / "files"

    def before() -> None:
        fresh(folder)
        (folder / "target").write_text("old")
        if is_link:
            (folder / "named").symlink_to("target")
        else:
            (folder / "target").rename(folder / "named")

    for _ in interrupted(
        lambda: files.write_text_atomically(folder / "named", "new"), before, kills
    ):
        assert (folder / "named").read_text() in {"old", "new"} and (
            folder / "named"
        ).is_symlink() == is_link
    assert (folder / "named").read_text() == "new" and (folder / "named").is_symlink() == is_link


def export(destination: Path, content: str) -> None:
    with staged_directory(destination, True, 10) as staged:
        (staged / "config.json").write_text(content)
        (staged / "model.safetensors").write_text(content)


@pytest.mark.parametrize("kills", [True, False], ids=["kill", "fault"])
@pytest.mark.parametrize("is_link", [False, True])
def test_a_model_that_is_overwritten(tmp_path, kills, is_link, swaps):
    folder = tmp_path / "models"
    destination = folder / "model"

    def before() -> None:
        fresh(folder)
        if is_link:
            destination.symlink_to(folder / "disk" / "model", target_is_directory=True)
        export(destination, "old")

    for _ in interrupted(lambda: export(destination, "new"), before, kills):
        if not destination.exists():  # between two renames: the next conversion puts it back
            assert kills and not swaps
            with (
                pytest.raises(CheckpointError, match="exists and is not empty"),
                staged_directory(destination, False, 10),
            ):
                pass
        contents = {
            (destination / name).read_text() for name in ("config.json", "model.safetensors")
        }
        assert contents in ({"old"}, {"new"}) and destination.is_symlink() == is_link
    assert (
        destination / "config.json"
    ).read_text() == "new" and destination.is_symlink() == is_link


def write_data(prefix: str, first: int) -> None:
    with IndexedWriter(prefix, np.uint16, with_modes=False) as writer:
        count = 3
        writer.append(
            Documents(
                np.arange(first, first + 2 * count),
                np.full(count, 2),
                np.zeros(0),
                np.ones(count, np.int64),
            )
        )


@pytest.mark.parametrize("kills", [True, False], ids=["kill", "fault"])
@pytest.mark.parametrize("has_old", [True, False], ids=["overwritten", "new"])
def test_prepared_data(tmp_path, kills, has_old):
    folder = tmp_path / "data"
    prefix = str(folder / "x_text_document")

    def before() -> None:
        fresh(folder)
        if has_old:
            write_data(prefix, 0)

    seen = set()
    for _ in interrupted(lambda: write_data(prefix, 100), before, kills):
        finish_interrupted(prefix)
        if not has_old and not Path(f"{prefix}.idx").exists():
            continue
        opened = open_indexed(prefix)
        assert opened.tokens.tolist() in ([0, 1, 2, 3, 4, 5], [100, 101, 102, 103, 104, 105])
        seen.add(int(opened.tokens[0]))
        write_data(prefix, 200)  # the command again
        assert sorted(os.listdir(folder)) == ["x_text_document.bin", "x_text_document.idx"]
    assert seen == ({0, 100} if has_old else {100})


def test_a_torn_line_of_the_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def before() -> None:
        for old in tmp_path.iterdir():
            old.unlink()
        path.write_text('{"step": 1}\n{"step": 2}\n{"st')

    def start() -> None:
        JsonLines(path).start()

    for _ in interrupted(start, before):
        assert [line["step"] for line in read_json_lines(path)] == [1, 2]
        torn = Path(f"{path}.torn")
        assert path.read_text().endswith('{"st') or torn.read_text().endswith('{"st\n')
    assert (
        path.read_text() == '{"step": 1}\n{"step": 2}\n'
        and json.dumps({"st": 1})[:4] in Path(f"{path}.torn").read_text()
    )
