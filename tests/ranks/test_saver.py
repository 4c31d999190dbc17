"""Saves that fail on a full disk, a lost directory or one rank lose no earlier checkpoint."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_sorted.checkpoint.manifest import find_damage, read_manifest
from tests.support.layouts import PP2
from tests.support.rank_bodies import save_under_faults, steps_from
from tests.support.ranks import run_ranks
from tests.support.same_state import assert_same_state
from tests.support.tiny import tiny


@pytest.fixture
def small_disk(tmp_path):
    """Return a file system of 1 MB; one checkpoint of the tiny model takes about 0.6 MB."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(where)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(
            "mounting needs root; test_a_limit_of_the_kernel checks the same path without it"
        )
    yield where
    subprocess.run(["umount", str(where)], check=True)


def names(root: Path) -> list[str]:
    return sorted(name for name in os.listdir(root) if not name.startswith(".lock"))


def test_a_full_disk_loses_nothing_and_training_continues(small_disk):
    first, second, third, lines = run_ranks(
        2, save_under_faults, tiny(**PP2), str(small_disk), "full disk"
    )[0]
    assert first.directory == small_disk / "iter_0000001" and not first.error
    assert second.directory is None and re.fullmatch(
        r"No space left on device, on rank [01]", second.error
    )
    # what failed is cleared away; once there is room again, the next save succeeds
    assert third.directory == small_disk / "iter_0000003" and not third.error
    assert names(small_disk) == [
        "iter_0000001",
        "iter_0000003",
        "latest_checkpointed_iteration.txt",
    ]
    for step in (1, 3):
        directory = small_disk / f"iter_{step:07d}"
        manifest = read_manifest(directory)
        assert find_damage(directory, manifest, manifest["files"]) == []
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert warning.startswith(
        "warning: the checkpoint of step 2 could not be written (No space left on device, on rank "
    )
    assert warning.endswith("; training continues. Newest complete checkpoint: step 1")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_limit_of_the_kernel_on_one_rank(tmp_path, rank):
    """If the kernel refuses one rank a file above 20 kB, all ranks learn of it and none hangs."""
    results = run_ranks(2, save_under_faults, tiny(**PP2), str(tmp_path), f"file limit on {rank}")
    for first, second, third, _ in results:
        assert first.directory and third.directory and not first.error and not third.error
        assert second.error == f"File too large, on rank {rank}"
    assert names(tmp_path) == ["iter_0000001", "iter_0000003", "latest_checkpointed_iteration.txt"]


def test_a_directory_that_vanished(tmp_path):
    results = run_ranks(
        2, save_under_faults, tiny(**PP2), str(tmp_path / "save"), "file in the way"
    )
    first, second, third, lines = results[0]
    assert first.directory and not first.error and third.directory and "File exists" in second.error
    assert sum(line.startswith("warning: ") for line in lines) == 1


def test_training_continues_during_a_save_and_does_not_change_it(tmp_path):
    """The checkpoint has the weights of its step, though training changed them before the write."""
    settings = tiny(**PP2, use_distributed_optimizer=True)
    for name in ("in the foreground", "in the background"):
        (tmp_path / name).mkdir()
    expected = run_ranks(
        4, steps_from, settings, str(tmp_path / "in the foreground"), False, 0, 2, True
    )
    run_ranks(4, steps_from, settings, str(tmp_path / "in the background"), False, 0, 2, True, 2)
    loaded = run_ranks(
        4, steps_from, settings, str(tmp_path / "in the background"), True, 2, 2, False
    )
    assert_same_state(loaded, expected, loaded=True)
    assert_same_state(loaded, expected)
