import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sorted.conversion.hugging_face.safetensors_files import (
    INDEX,
    SafetensorsFile,
    SafetensorsWriter,
)
from megatron_sorted.conversion.hugging_face.weight_files import HuggingFaceFiles
from megatron_sorted.conversion.tensors.source import TensorInfo
from megatron_sorted.errors import CheckpointError

TENSORS = {
    "a": torch.arange(12.0).view(3, 4),
    "b": torch.arange(5).to(torch.bfloat16),
    "c": torch.tensor(3.5, dtype=torch.float16),
    "empty": torch.empty(0, 4),
    "d": torch.randn(7, 2, generator=torch.Generator().manual_seed(0)),
}
INFOS = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def write(directory, max_shard_bytes):
    writer = SafetensorsWriter(directory, INFOS, max_shard_bytes)
    for name, tensor in TENSORS.items():
        writer.write(name, tensor)
    writer.close()


def same(tensors, expected=TENSORS):
    return tensors.keys() == expected.keys() and all(
        tensors[name].dtype == expected[name].dtype and torch.equal(tensors[name], expected[name])
        for name in expected
    )


@pytest.mark.parametrize(("size", "files"), [(1000, 1), (60, 2), (1, 5)])
def test_the_library_reads_what_is_written_and_we_read_it_too(size, files, tmp_path):
    write(tmp_path, size)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == files
    assert same({name: tensor for shard in shards for name, tensor in load_file(shard).items()})
    source = HuggingFaceFiles(tmp_path)
    assert dict(source.tensors) == INFOS
    assert same({name: source.read(name) for name in source.tensors})
    if files > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
        assert {name: shard.name for shard in shards for name in load_file(shard)} == index[
            "weight_map"
        ]


def test_we_read_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    source = SafetensorsFile(tmp_path / "model.safetensors")
    assert same({name: source.read(name) for name in source.tensors})


def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    writer = SafetensorsWriter(tmp_path, {"x": TensorInfo((6, 2), torch.float32)}, 1000)
    writer.write("x", whole[1:3].t())
    writer.close()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], whole[1:3].t())


def test_tensors_must_be_written_as_announced(tmp_path):
    writer = SafetensorsWriter(tmp_path, INFOS, 1000)
    with pytest.raises(AssertionError, match="b came where a was announced"):
        writer.write("b", TENSORS["b"])


def shards_of(tmp_path):
    write(tmp_path, 60)
    return sorted(tmp_path.glob("*.safetensors"))


def test_a_missing_shard_is_named(tmp_path):
    shards_of(tmp_path)[1].unlink()
    with pytest.raises(
        CheckpointError, match=r"names 2 files and 1 are missing: model-00002-of-00002\.safetensors"
    ):
        HuggingFaceFiles(tmp_path)


def test_a_shard_cut_short_is_named(tmp_path):
    shard = shards_of(tmp_path)[1]
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(
        CheckpointError,
        match=r"00002-of-00002\.safetensors: \d+ bytes where its header says \d+; it is too short",
    ):
        HuggingFaceFiles(tmp_path)


@pytest.mark.parametrize("length", [0, 5, 20])
def test_a_file_of_a_few_bytes_is_no_safetensors_file(length, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(
        b"\x40" + b"\0" * 7 + b"x" * length if length > 8 else b"x" * length
    )
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        HuggingFaceFiles(tmp_path)


def test_a_name_in_two_shards_is_named(tmp_path):
    shards = shards_of(tmp_path)
    save_file({**load_file(shards[1]), "a": torch.ones(3, 4)}, shards[1], {"format": "pt"})
    with pytest.raises(
        CheckpointError,
        match=r"a occurs twice, in model-00001-of-00002\.safetensors and in model-00002-of-00002",
    ):
        HuggingFaceFiles(tmp_path)


def test_a_name_twice_in_one_header_is_named(tmp_path):
    entry = '"x":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    header = ("{" + entry % (0, 4) + "," + entry % (4, 8) + "}").encode()
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + b"\0" * 8
    )
    with pytest.raises(CheckpointError, match=r"model.safetensors: .*x occurs twice"):
        HuggingFaceFiles(tmp_path)


def test_tensors_unknown_to_the_index_or_missing_are_named(tmp_path):
    shards = shards_of(tmp_path)
    content = load_file(shards[0])
    save_file({**content, "other": torch.ones(2)}, shards[0], {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"other in model-00001-of-00002.safetensors is unknown"
    ):
        HuggingFaceFiles(tmp_path)
    content.pop("a")
    save_file(content, shards[0], {"format": "pt"})
    with pytest.raises(
        CheckpointError,
        match=r"names a in model-00001-of-00002.safetensors, which does not hold it",
    ):
        HuggingFaceFiles(tmp_path)


def test_an_index_cannot_name_files_outside_the_directory(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    (inside / INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="lies outside the directory"):
        HuggingFaceFiles(inside)


def test_pickles_are_refused_with_the_reason(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pickled \(pytorch_model.bin\). A pickle can run any program"
    ):
        HuggingFaceFiles(tmp_path)


def test_unknown_data_types_are_named(tmp_path):
    save_file({"a": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="a is of kind F8_E4M3"):
        HuggingFaceFiles(tmp_path)


def test_the_error_for_a_directory_without_weights_names_the_remedy(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights"):
        HuggingFaceFiles(tmp_path)
