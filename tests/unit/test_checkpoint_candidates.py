"""Which checkpoint a resume takes, and what it says of the others."""

import contextlib
import hashlib
import json
import re
import shutil

import pytest

from megatron_sorted.checkpoint.candidates import find_candidates, tracked_step
from megatron_sorted.checkpoint.layout import TRACKER, iteration_directory
from megatron_sorted.checkpoint.manifest import MANIFEST, Progress, manifest_text, record_file
from megatron_sorted.errors import CheckpointError


def write(root, step, run_id="a", saved_at=None, **more):
    """Write a checkpoint of one file."""
    directory = iteration_directory(root, step)
    directory.mkdir()
    (directory / "shard").write_bytes(b"x" * step)
    description = {"run_id": run_id, "saved_at": saved_at or f"2026-01-01T00:{step:02d}", **more}
    (directory / MANIFEST).write_text(
        manifest_text(
            description, Progress(step, 8 * step), {"shard": record_file(directory / "shard")}
        )
    )
    return directory


def steps(listed):
    return [candidate.step for candidate in listed.usable]


def test_newest_first_and_the_tracker_is_not_needed(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step)
    assert steps(find_candidates(tmp_path)) == [30, 20, 10]
    (tmp_path / TRACKER).write_text("20\n")  # killed between the rename of 30 and the tracker
    listed = find_candidates(str(tmp_path))
    assert steps(listed) == [30, 20, 10] and listed.passed_over(listed.usable[0]) == []


def test_incomplete_ones_are_passed_over_by_name(tmp_path):
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    (tmp_path / TRACKER).write_text("40")
    (tmp_path / "iter_0000040" / "shard").write_bytes(b"short")
    (tmp_path / "iter_0000030" / MANIFEST).unlink()
    (tmp_path / "iter_0000010" / "shard").unlink()
    listed = find_candidates(tmp_path)
    assert steps(listed) == [20]
    assert listed.passed_over(listed.usable[0]) == [
        f"{tmp_path}/iter_0000040/shard: 5 bytes where the manifest says 40; it is truncated.",
        f"{tmp_path}/iter_0000030: manifest.json is missing, "
        "so this is no complete checkpoint of megatron_sorted.",
    ]
    assert len(listed.passed_over(None)) == 3


def test_a_run_that_started_over_does_not_continue_the_one_before(tmp_path):
    write(tmp_path, 100, "old", "2026-01-01T01:00")
    write(tmp_path, 10, "new", "2026-01-02T01:00")
    (tmp_path / TRACKER).write_text("10")
    listed = find_candidates(tmp_path)
    assert steps(listed) == [10]
    assert listed.passed_over(listed.usable[0]) == [
        f"{tmp_path}/iter_0000100: of run old, not of new."
    ]
    (tmp_path / TRACKER).unlink()  # without a tracker, the run that saved last
    assert steps(find_candidates(tmp_path)) == [10]


def test_a_run_that_went_back_ignores_the_later_checkpoints(tmp_path):
    write(tmp_path, 50, saved_at="2026-01-02T00:00")
    write(tmp_path, 60, saved_at="2026-01-01T00:06")
    write(tmp_path, 40, saved_at="2026-01-01T00:04")
    (tmp_path / TRACKER).write_text("50")
    listed = find_candidates(tmp_path)
    assert steps(listed) == [50, 40]
    assert listed.passed_over(listed.usable[0]) == [
        f"{tmp_path}/iter_0000060: saved before iter_0000050, to which the run went back."
    ]


def test_a_missing_checkpoint_that_the_tracker_names_is_reported(tmp_path):
    write(tmp_path, 10)
    (tmp_path / TRACKER).write_text("20")
    listed = find_candidates(tmp_path)
    assert steps(listed) == [10]
    assert listed.passed_over(listed.usable[0]) == [
        f"{tmp_path}/iter_0000020: missing, although {TRACKER} names it."
    ]


@pytest.mark.parametrize("text", ["", "release", "-3", "1.5"])
def test_a_tracker_without_a_number_is_reported_and_ignored(tmp_path, text):
    write(tmp_path, 10)
    (tmp_path / TRACKER).write_text(text)
    listed = find_candidates(tmp_path)
    assert steps(listed) == [10]
    assert listed.passed_over(listed.usable[0]) == [
        f"{tmp_path / TRACKER}: {text!r} is not an iteration number; "
        "taking the newest complete checkpoint."
    ]
    with pytest.raises(CheckpointError):
        tracked_step(tmp_path)


def test_one_step_by_name(tmp_path):
    for step in (10, 20):
        write(tmp_path, step)
    assert steps(find_candidates(tmp_path, 10)) == [10]
    with pytest.raises(
        CheckpointError,
        match=re.escape(
            f"--ckpt-step: {tmp_path} holds no checkpoint of step 15; there are: 20, 10. "
        ),
    ):
        find_candidates(tmp_path, 15)
    (tmp_path / "iter_0000020" / "shard").unlink()
    with pytest.raises(CheckpointError, match="iter_0000020/shard: No such file"):
        find_candidates(tmp_path, 20)


def test_an_empty_directory_has_no_candidate(tmp_path):
    listed = find_candidates(tmp_path / "missing")
    assert (listed.usable, listed.passed_over(None)) == ([], [])


IMPORTED = {"contents": "weights", "run_id": "import"}


def test_weights_alone_are_taken_until_a_run_has_saved_beside_them(tmp_path):
    write(tmp_path, 0, **IMPORTED)
    (tmp_path / TRACKER).write_text("0")
    listed = find_candidates(tmp_path)
    assert steps(listed) == [0] and listed.usable[0].weights_only
    write(tmp_path, 10)  # killed between its rename and the tracker
    listed = find_candidates(tmp_path)
    assert (
        steps(listed) == [10]
        and not listed.usable[0].weights_only
        and listed.passed_over(listed.usable[0]) == []
    )
    write(tmp_path, 20)
    (tmp_path / TRACKER).write_text("20")
    assert steps(find_candidates(tmp_path)) == [20, 10]
    assert steps(find_candidates(tmp_path, 0)) == [0]


def test_a_damaged_run_does_not_fall_back_to_the_weights_it_began_with(tmp_path):
    write(tmp_path, 0, **IMPORTED)
    write(tmp_path, 10)
    listed = find_candidates(tmp_path)
    listed.skipped.append((10, "damaged"))
    assert listed.passed_over(None) == [
        "damaged",
        f"{tmp_path}/iter_0000000: weights only, from which a run can start but not continue.",
    ]


def test_weights_imported_anew_go_before_an_older_run(tmp_path):
    write(tmp_path, 10)
    write(tmp_path, 0, saved_at="2026-01-02T00:00", **IMPORTED)
    for tracked in ("0", None):
        (tmp_path / TRACKER).unlink(missing_ok=True)
        if tracked:
            (tmp_path / TRACKER).write_text(tracked)
        listed = find_candidates(tmp_path)
        assert steps(listed) == [0]
        assert listed.passed_over(listed.usable[0]) == [
            f"{tmp_path}/iter_0000010: saved before iter_0000000, which was imported since."
        ]
    write(tmp_path, 5, run_id="b", saved_at="2026-01-03T00:00")
    listed = find_candidates(tmp_path)
    assert steps(listed) == [5]


def test_a_copy_under_another_name_is_passed_over_by_name(tmp_path):
    for step in (4, 8):
        write(tmp_path, step)
    shutil.copytree(tmp_path / "iter_0000004", tmp_path / "iter_0000099")
    listed = find_candidates(tmp_path)
    assert steps(listed) == [8, 4]
    assert listed.passed_over(listed.usable[0]) == [
        f"{tmp_path}/iter_0000099: its manifest says step 4, so it is a copy under another name. "
        "Move it elsewhere, or rename it to iter_0000004."
    ]
    with pytest.raises(CheckpointError, match="its manifest says step 4"):
        find_candidates(tmp_path, 99)


@pytest.mark.parametrize(
    "name", ["iter_00000012", "iter_٠٠٠٠٠١٢", "iter_0000012 ", "iter_" + "9" * 5000]
)
def test_other_spellings_of_a_step_are_no_checkpoints(tmp_path, name):
    write(tmp_path, 10)
    with contextlib.suppress(OSError):  # some names are too long for a file system
        shutil.copytree(tmp_path / "iter_0000010", tmp_path / name)
    assert steps(find_candidates(tmp_path)) == [10]


@pytest.mark.parametrize(
    "content", [b"9" * 5000, "²".encode(), b"\xff\xfe", b"\0" * 40, b"-0", b"[" * 100_000]
)
def test_a_tracker_of_any_bytes_is_reported_and_ignored(tmp_path, content):
    write(tmp_path, 10)
    (tmp_path / TRACKER).write_bytes(content)
    listed = find_candidates(tmp_path)
    assert steps(listed) == [10] and len(listed.passed_over(listed.usable[0])) == 1
    with pytest.raises(CheckpointError):
        tracked_step(tmp_path)


def whole(**entries) -> str:
    """Return a manifest whose own hash is right, with other entries."""
    manifest = json.loads(manifest_text({"run_id": "a", "saved_at": "2026"}, Progress(20, 1), {}))
    manifest = {
        key: value
        for key, value in {**manifest, **entries}.items()
        if value is not None and key != "sha256"
    }
    digest = hashlib.sha256(
        json.dumps(manifest, sort_keys=True, ensure_ascii=True).encode()
    ).hexdigest()
    return json.dumps({**manifest, "sha256": digest})


@pytest.mark.parametrize("text", [
    "[" * 100_000, '{"a":' * 100_000, '{"format": ' + "9" * 5000 + "}", "\0", "null",
    '{"format": 2.0}', '{"format": true}',
    whole(progress=None), whole(progress=[]), whole(progress={"step": "20", "samples": 1}),
    whole(progress={"step": -1, "samples": 1}), whole(progress={"step": True, "samples": 1}),
    whole(files=[]), whole(files={"x": None}), whole(files={"x": {"bytes": 0}}),
    whole(files={"../../etc/passwd": {"bytes": 1, "sha256": ""}}),
    whole(files={"/etc/passwd": {"bytes": 1, "sha256": ""}}),
    whole(run_id=None), whole(run_id=7), whole(saved_at=None), whole(settings="x"),
    whole(shape=[]), whole(tokenizer="x"),
])  # fmt: skip
def test_a_manifest_of_any_content_is_passed_over(tmp_path, text):
    write(tmp_path, 10)
    directory = write(tmp_path, 20)
    (directory / MANIFEST).write_text(text)
    listed = find_candidates(tmp_path)
    assert steps(listed) == [10]
    [sentence] = listed.passed_over(listed.usable[0])
    assert "\n" not in sentence and len(sentence) < 400
