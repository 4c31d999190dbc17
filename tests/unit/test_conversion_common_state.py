"""What all ranks share is read from a file or an object; every damage is one sentence."""

import enum
import importlib
import io
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from megatron_sorted.checkpoint.plain_objects import STAND_INS, check_checkpoint_is_safe, load_plain
from megatron_sorted.conversion.megatron.common_state import COMMON_FILE, COMMON_OBJECT, MAX_BYTES
from megatron_sorted.conversion.megatron.directory import open_megatron
from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.errors import CheckpointError
from tests.support.stored_files import tiny_arguments, tiny_weights, write_torch_dist

WEIGHTS = {
    name: (value, [("__0_0.distcp", (0,) * value.dim(), tuple(value.shape))])
    for name, value in tiny_weights().items()
}
COMMON = {"args": tiny_arguments(1, 1), "iteration": 3, "checkpoint_version": 3.0}


class Runs:
    """An object that prints when a plain pickle reads it."""

    def __reduce__(self):
        return print, ("never",)


def change_metadata(directory: Path, change) -> None:
    """Apply ``change`` to the place of the object in the metadata."""
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # written by the test itself
    for index in list(metadata.storage_data):
        if index.fqn == COMMON_OBJECT:
            change(metadata.storage_data, index)
    path.write_bytes(pickle.dumps(metadata))


def test_an_object_beside_the_weights_is_read_as_the_file_was(tmp_path):
    write_torch_dist(tmp_path / "newer", WEIGHTS, {COMMON_OBJECT: [COMMON]})
    write_torch_dist(tmp_path / "older", WEIGHTS)
    torch.save(COMMON, tmp_path / "older" / COMMON_FILE)
    newer, older = open_megatron(tmp_path / "newer"), open_megatron(tmp_path / "older")
    assert newer[1] == older[1] and newer[1]["num_layers"] == 4
    assert newer[0].common_states() == {COMMON_OBJECT: COMMON}
    assert older[0].common_states() == {COMMON_FILE: COMMON}
    assert newer[0].tensors == older[0].tensors


def test_both_forms_are_read_if_they_agree(tmp_path):
    write_torch_dist(tmp_path, WEIGHTS, {COMMON_OBJECT: [COMMON]})
    torch.save({**COMMON, "iteration": 2}, tmp_path / COMMON_FILE)
    _, settings = open_megatron(tmp_path)
    assert settings["num_layers"] == 4
    torch.save({"iteration": 2}, tmp_path / COMMON_FILE)  # the arguments are in one of them only
    assert open_megatron(tmp_path)[1] == settings
    torch.save({**COMMON, "args": tiny_arguments(1, 1, num_layers=5)}, tmp_path / COMMON_FILE)
    with pytest.raises(
        CheckpointError,
        match=r"num_layers is 5 by common\.pt and 4 by common_state/shard_0_1, so it holds files "
        r"of two saves\. Delete common\.pt if",
    ):
        open_megatron(tmp_path)


def test_a_checkpoint_with_neither_is_refused_with_both_names(tmp_path):
    write_torch_dist(tmp_path, WEIGHTS)
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    assert open_megatron(tmp_path)[1] is None
    with pytest.raises(
        CheckpointError,
        match=r"holds no arguments, .* common\.pt, from 0\.19 on into common_state/shard_0_1 of",
    ):
        open_model(tmp_path)


def test_an_empty_file_is_refused_even_beside_an_object(tmp_path):
    write_torch_dist(tmp_path, WEIGHTS, {COMMON_OBJECT: [COMMON]})
    (tmp_path / COMMON_FILE).touch()
    with pytest.raises(CheckpointError, match=r"common\.pt: not readable .*It is damaged"):
        open_megatron(tmp_path)


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (
            {"common_state/shard_0_2": [COMMON], "common_state/shard_1_2": [COMMON]},
            r"lists common_state/shard_0_2, common_state/shard_1_2, but Megatron writes one",
        ),
        ({COMMON_OBJECT: [COMMON], "common_state/shard_1_2": [COMMON]}, "but Megatron writes one"),
        ({COMMON_OBJECT: COMMON}, "holds a dict, not a list of one dict"),
        ({COMMON_OBJECT: [COMMON, 3]}, r"holds a list of 2 \(dict, int\), not a list of one dict"),
        ({COMMON_OBJECT: [7]}, r"holds a list of 1 \(int\), not a list of one dict"),
        ({COMMON_OBJECT: [{"args": Runs()}]}, r"in __0_0\.distcp: refused: it asks for .*print"),
        ({COMMON_OBJECT: [{"args": {"num_layers": 4}}]}, "arguments do not say hidden_size"),
    ],
)
def test_a_wrong_object_is_refused(objects, message, tmp_path, capsys):
    write_torch_dist(tmp_path, WEIGHTS, objects)
    with pytest.raises(CheckpointError, match=message):
        open_megatron(tmp_path)
    assert capsys.readouterr().out == ""


def test_an_object_of_an_old_torch_is_refused(tmp_path):
    content = io.BytesIO()
    torch.save([{"args": Runs()}], content, _use_new_zipfile_serialization=False)
    write_torch_dist(tmp_path, WEIGHTS, {COMMON_OBJECT: [COMMON]})
    path = tmp_path / "__1_0.distcp"
    path.write_bytes(content.getvalue())

    def elsewhere(data, index):
        data[index].relative_path, data[index].offset = path.name, 0
        data[index].length = len(content.getvalue())

    change_metadata(tmp_path, elsewhere)
    with pytest.raises(
        CheckpointError, match=r"in __1_0\.distcp: not readable .*torch before 1\.6"
    ):
        open_megatron(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data, index: data.pop(index), "the metadata does not say where it lies"),
        (
            lambda data, index: setattr(data[index], "length", MAX_BYTES + 1),
            r"is of 268,435,457 bytes, more than any arguments take \(268,435,456 at most\)",
        ),
        (lambda data, index: setattr(data[index], "length", 1 << 70), "more than any arguments"),
        (
            lambda data, index: setattr(data[index], "offset", 1 << 70),
            r"in __0_0\.distcp: the file has \d+ bytes, but it lies up to byte 11805916",
        ),
        (
            lambda data, index: setattr(data[index], "relative_path", "__7_0.distcp"),
            r"in __7_0\.distcp: the file is missing\. Copy the whole directory again",
        ),
        (
            lambda data, index: setattr(data[index], "relative_path", "../__0_0.distcp"),
            "not a file of this directory",
        ),
        (lambda data, index: setattr(data[index], "length", -1), "and has -1 bytes"),
        (lambda data, index: setattr(data[index], "offset", 0.5), "begins at 0.5"),
        (
            lambda data, index: setattr(data[index], "offset", 0),
            "not readable|refused|does not|not",
        ),
    ],
)
def test_a_wrong_place_of_the_object_is_refused(change, message, tmp_path):
    write_torch_dist(tmp_path, WEIGHTS, {COMMON_OBJECT: [COMMON]})
    change_metadata(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        open_megatron(tmp_path)


def test_a_file_that_was_cut_off_or_changed_is_refused(tmp_path):
    write_torch_dist(tmp_path, WEIGHTS, {COMMON_OBJECT: [COMMON]})
    path = tmp_path / "__0_0.distcp"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"common_state/shard_0_1 in .* cut off\. Copy it"):
        open_megatron(tmp_path)
    at = content.index(b"num_attention_heads")
    path.write_bytes(content[:at] + b"x" + content[at + 1 :])
    with pytest.raises(CheckpointError, match=r"common_state/shard_0_1 in .* match their checksum"):
        open_megatron(tmp_path)


def test_a_place_of_any_size_is_checked_before_megatron_loads(tmp_path):
    """The bytes that a metadata asks for are compared with the file before any are read."""
    write_torch_dist(tmp_path, {}, {COMMON_OBJECT: [COMMON]})
    for attribute, number in (("length", 1 << 62), ("offset", 1 << 70)):
        directory = Path(shutil.copytree(tmp_path, tmp_path / attribute))
        change_metadata(directory, lambda data, i, a=attribute, n=number: setattr(data[i], a, n))
        with pytest.raises(
            CheckpointError, match=r"__0_0\.distcp ends after \d+ bytes, \d{19,} are"
        ):
            check_checkpoint_is_safe(directory)


def test_every_class_that_the_installed_megatron_stores_is_read():
    importlib.import_module("megatron_sorted.platform.cpu")
    safe = importlib.import_module("megatron.core.safe_globals").SAFE_GLOBALS
    names = {f"{value.__module__}.{value.__qualname__}" for value in safe}
    assert names - {"argparse.Namespace"} <= {name for _, name in STAND_INS}


@pytest.mark.parametrize("name", ["InferenceCudaGraphScope", "CudaGraphModule", "AttnBackend"])
def test_enumerations_of_newer_megatrons_are_read(name, monkeypatch, tmp_path):
    module = "megatron.core.transformer.enums"
    kind = enum.Enum(name, {"none": 1}, module=module)
    monkeypatch.setattr(importlib.import_module(module), name, kind, raising=False)
    arguments = tiny_arguments(1, 1, inference_cuda_graph_scope=kind(1))
    write_torch_dist(tmp_path, WEIGHTS, {COMMON_OBJECT: [{"args": arguments}]})
    source, settings = open_megatron(tmp_path)
    assert settings["num_layers"] == 4
    read = source.common_states()[COMMON_OBJECT]["args"].inference_cuda_graph_scope
    assert (type(read).__name__, read.arguments) == (name, (1,))


def test_the_state_of_a_generator_is_read(tmp_path):
    content = io.BytesIO()
    torch.save({"cuda_rng_state": torch.Generator().manual_seed(3)}, content)
    content.seek(0)
    assert type(load_plain(content, "here")["cuda_rng_state"]).__name__ == "Generator"
