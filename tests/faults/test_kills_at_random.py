"""SIGKILL at a random moment, a hundred times at each place that replaces or removes files."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sorted import files
from megatron_sorted.checkpoint.candidates import find_candidates
from megatron_sorted.checkpoint.layout import iteration_directory
from megatron_sorted.checkpoint.manifest import find_damage
from megatron_sorted.checkpoint.publishing import Retention, remove_leftovers
from megatron_sorted.conversion.staging import staged_directory
from megatron_sorted.data.indexed import open_indexed
from megatron_sorted.errors import CheckpointError
from tests.faults.test_places import checkpoint, export, fresh, save, swaps, tmp_path, write_data

pytestmark = pytest.mark.faults
KILLS, LONGEST_SECONDS = 100, 0.03
__all__ = ("swaps", "tmp_path")  # fixtures


def killed(work: Callable[[int], object], check: Callable[[], object]) -> None:
    """Repeat ``work(0)``, ``work(1)``, ... in a child, kill it at a random moment, and check.

    Do so a hundred times.
    """
    moments = random.Random(7)
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            number = 0
            while True:
                try:
                    work(number)
                except BaseException:
                    os._exit(1)
                number += 1
        time.sleep(moments.uniform(0.0, LONGEST_SECONDS))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the work failed by itself"
        check()


def test_saves_of_one_step_and_of_new_ones(tmp_path, swaps):
    fresh(tmp_path / "save")
    root, newest = tmp_path / "save", [20]
    checkpoint(root, 10, b"ten")
    checkpoint(root, 20, b"old")

    def work(number: int) -> None:
        save(root, newest[0] + (number + 1) // 2, Retention(retain=2))

    def check() -> None:
        candidate = find_candidates(root).usable[0]
        assert (
            find_damage(candidate.directory, candidate.manifest, candidate.manifest["files"]) == []
            and candidate.step >= newest[0]
        )
        newest[0] = candidate.step
        remove_leftovers(root)
        assert find_candidates(root).usable[0].step == newest[0]
        assert not any(name.startswith(".iter") for name in os.listdir(root))

    remove_leftovers(root)
    killed(work, check)
    assert newest[0] > 20 and iteration_directory(root, newest[0]).is_dir()


def test_files_models_and_data(tmp_path, swaps):
    path, model, prefix = tmp_path / "file", tmp_path / "model", str(tmp_path / "x_text_document")
    files.write_text_atomically(path, "0" * 1000)
    export(model, "0")
    write_data(prefix, 0)

    def work(number: int) -> None:
        files.write_text_atomically(path, str(number % 10) * 1000)
        export(model, str(number))
        write_data(prefix, 10 * number)

    def check() -> None:
        text = path.read_text()
        assert len(text) == 1000 and len(set(text)) == 1
        if not model.exists():
            assert not swaps
            with pytest.raises(CheckpointError), staged_directory(model, False, 10):
                pass
        assert (
            len({(model / name).read_text() for name in ("config.json", "model.safetensors")}) == 1
        )
        tokens = open_indexed(prefix).tokens.tolist()
        assert tokens == list(range(tokens[0], tokens[0] + 6))

    killed(work, check)
    for left in Path(tmp_path).glob(".file.*"):  # half a file under a name of its own
        left.unlink()
