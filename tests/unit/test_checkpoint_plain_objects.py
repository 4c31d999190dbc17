"""A checkpoint is looked through before Megatron loads it: nothing of it can run."""

import os
import pickle
import random

import numpy
import pytest
import torch

from megatron_sorted.checkpoint.plain_objects import check_checkpoint_is_safe
from megatron_sorted.errors import CheckpointError
from tests.support.stored_files import write_torch_dist

RANDOM = {
    "python": random.getstate(),
    "numpy": numpy.random.get_state(),
    "torch": torch.get_rng_state(),
}
WEIGHT = {"decoder.final_layernorm.weight": (torch.ones(3), [("__0_0.distcp", (0,), (3,))])}


class Touches:
    """Makes a file when a plain pickle reads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_random_state_and_extra_state_of_layers_are_let_through(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    write_torch_dist(
        tmp_path,
        WEIGHT,
        {"random_state/shard_0.0_1.1": RANDOM, "decoder.layers.x._extra_state/shard_0_1": None},
    )
    check_checkpoint_is_safe(tmp_path)
    assert set(torch.serialization.get_safe_globals()) == before


def test_an_object_that_runs_something_is_refused_by_name(tmp_path):
    write_torch_dist(
        tmp_path, WEIGHT, {"random_state/shard_0.0_1.1": {"python": Touches(tmp_path / "ran")}}
    )
    with pytest.raises(
        CheckpointError, match=r"random_state/shard_0\.0_1\.1: refused: it asks for \S*mkdir"
    ):
        check_checkpoint_is_safe(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_metadata_that_runs_something_is_refused(tmp_path):
    write_torch_dist(tmp_path, WEIGHT)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Touches(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"refused: pickle asks for \S*mkdir"):
        check_checkpoint_is_safe(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_object_that_is_cut_off_is_reported(tmp_path):
    write_torch_dist(tmp_path, {}, {"random_state/shard_0.0_1.1": RANDOM})
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(
        CheckpointError, match=r"random_state/shard_0\.0_1\.1: __0_0\.distcp ends after"
    ):
        check_checkpoint_is_safe(tmp_path)
