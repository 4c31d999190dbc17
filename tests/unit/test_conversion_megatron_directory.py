"""The checkpoint that a path names, and errors where there is none."""

import json

import pytest
import torch

from megatron_sorted.conversion.megatron.directory import open_megatron
from megatron_sorted.conversion.megatron.legacy_files import LegacyFiles
from megatron_sorted.conversion.megatron.torch_dist_files import TorchDistFiles
from megatron_sorted.errors import CheckpointError
from tests.support.stored_files import tiny_arguments, tiny_weights, write_old, write_torch_dist


def rectangles(weights: dict) -> dict:
    return {
        name: (value, [("__0_0.distcp", (0,) * value.dim(), tuple(value.shape))])
        for name, value in weights.items()
    }


@pytest.mark.parametrize(
    ("tracker", "name"),
    [("7", "iter_0000007"), ("release\n", "release"), ("1234567890", "iter_1234567890")],
)
def test_the_tracker_is_followed(tracker, name, tmp_path):
    write_old(tmp_path / name, tiny_weights())
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    for path in (tmp_path, tmp_path / name):
        source, settings = open_megatron(path)
        assert isinstance(source, LegacyFiles) and (source.step, settings["num_layers"]) == (7, 4)


def test_a_given_step_is_taken_instead_of_the_trackers(tmp_path):
    for step, rows in ((7, 3), (20, 5)):
        weights = {**tiny_weights()}
        weights["decoder.final_layernorm.weight"] = torch.full((8,), float(rows))
        write_torch_dist(tmp_path / f"iter_{step:07d}", rectangles(weights))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20")
    for step, value in ((None, 5.0), (20, 5.0), (7, 3.0)):
        source, _ = open_megatron(tmp_path, step)
        assert source.read("decoder.final_layernorm.weight")[0] == value
    assert open_megatron(tmp_path / "iter_0000007", 7)
    with pytest.raises(
        CheckpointError, match=r"holds no iter_0000008.* iter_0000007, iter_0000020"
    ):
        open_megatron(tmp_path, 8)
    with pytest.raises(CheckpointError, match=r"--ckpt-step: 8, but .* is one checkpoint"):
        open_megatron(tmp_path / "iter_0000007", 8)


def test_torch_dist_files_hold_arguments(tmp_path):
    write_torch_dist(tmp_path / "iter_0000012", rectangles(tiny_weights()))
    source, settings = open_megatron(tmp_path / "iter_0000012")
    assert (settings, len(source.tensors)) == (None, 26)
    torch.save(
        {"args": tiny_arguments(1, 1), "iteration": 13}, tmp_path / "iter_0000012" / "common.pt"
    )
    source, settings = open_megatron(tmp_path / "iter_0000012")
    assert settings["num_layers"] == 4 and isinstance(source, TorchDistFiles)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds neither latest_checkpointed_iteration.txt nor a checkpoint"),
        ({"config.json": "{}"}, "looks like a Hugging Face directory"),
        ({"iter_0000005/x": "", "release/x": ""}, "Give one of those in it: iter_0000005, release"),
        ({"latest_checkpointed_iteration.txt": "seven"}, "says 'seven', which is neither a number"),
        ({"latest_checkpointed_iteration.txt": "7"}, "iter_0000007: is missing"),
        (
            {"latest_checkpointed_iteration.txt": "7", "iter_0000007/x": ""},
            "holds neither .metadata nor mp_rank",
        ),
        (
            {".metadata": "", "metadata.json": json.dumps({"sharded_backend": "zarr"})},
            "stored as 'zarr'",
        ),
        ({".metadata": "", "metadata.json": "{"}, "metadata.json: not JSON"),
    ],
)
def test_a_path_without_a_checkpoint_is_refused(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_megatron(tmp_path)


def test_a_missing_path_and_another_model_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is no directory"):
        open_megatron(tmp_path / "none")
    write_torch_dist(tmp_path, rectangles({"encoder.weight": torch.ones(2)}))
    with pytest.raises(
        CheckpointError, match=r"holds no embedding\.word_embeddings\.weight \(but encoder\.weight"
    ):
        open_megatron(tmp_path)
