"""Damaged files of model directories: every command reports one sentence.

It does so in bounded time and memory.
"""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_sorted.checkpoint.restricted_pickle import METADATA
from megatron_sorted.conversion.exporting import export_model
from megatron_sorted.conversion.importing import import_model
from megatron_sorted.conversion.megatron.common_state import COMMON_OBJECT
from megatron_sorted.conversion.megatron.directory import open_megatron
from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.conversion.origins import RequestedExits
from megatron_sorted.conversion.writing import WriteOptions
from megatron_sorted.exported.exit_plan import plan_exits
from megatron_sorted.exported.load import load_with_exits
from tests.support.fuzzing import check_reader, fuzzed
from tests.support.model_directories import save_model
from tests.support.stored_files import write_torch_dist


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    directory = tmp_path_factory.mktemp("origin")
    save_model(directory / "one", "llama3")
    save_model(directory / "many", "qwen2", num_shards=3)
    import_model(
        open_model(directory / "one"),
        directory / "runs",
        RequestedExits((2,), own_norms=True),
        WriteOptions(verify=False),
    )
    export_model(open_model(directory / "runs"), directory / "nested", WriteOptions(verify=False))
    return directory


def opened(directory: Path) -> None:
    """Open a directory by every reader; all must refuse alike.

    So the last one decides for files that the first accepted.
    """
    plan_exits(directory)
    open_model(directory)
    load_with_exits(directory, torch.float32)


def damage(origin: Path, kind: str, name: str, tmp_path: Path, read, examples: int) -> None:
    directory = Path(shutil.copytree(origin / kind, tmp_path / kind))
    path = directory / name
    valid = path.read_bytes()

    def once(data: bytes) -> None:
        path.write_bytes(data)
        read(directory)

    check_reader([valid], once, examples)


@fuzzed
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("one", "config.json"),
        ("many", "config.json"),
        ("many", "model.safetensors.index.json"),
        ("nested", "generation_config.json"),
        ("nested", "config.json"),
        ("one", "model.safetensors"),
        ("nested", "exits.safetensors"),
    ],
)
def test_files_of_a_hugging_face_directory(kind, name, examples, origin, tmp_path):
    damage(origin, kind, name, tmp_path, opened, examples)


@fuzzed
def test_headers_of_safetensors(examples, origin, tmp_path):
    directory = Path(shutil.copytree(origin / "one", tmp_path / "one"))
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")

    def read(header: bytes) -> None:  # its length is right, so that what stands in it is looked at
        path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
        open_model(directory)

    check_reader([whole[8 : 8 + length]], read, examples)


@fuzzed
def test_the_metadata_of_a_checkpoint(examples, origin, tmp_path):
    directory = Path(shutil.copytree(origin / "runs" / "iter_0000000", tmp_path / "x"))
    (directory / "manifest.json").unlink(missing_ok=True)
    path = directory / METADATA

    def read(data: bytes) -> None:
        path.write_bytes(data)
        open_megatron(directory)

    check_reader([path.read_bytes()], read, examples)


@fuzzed
def test_the_arguments_of_a_checkpoint(examples, origin, tmp_path):
    directory = Path(shutil.copytree(origin / "runs" / "iter_0000000", tmp_path / "x"))
    (directory / "manifest.json").unlink(missing_ok=True)
    arguments = {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 96,
        "swiglu": True,
        "vocab_size": 100,
        "padded_vocab_size": 128,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "rotary_base": 10000.0,
        "window_size": [20, 0],
        "exit_layer_nums": [1, 3],
        "use_exit_norm": True,
        "rope_scaling_factor": 8.0,
        "use_rope_scaling": True,
        "num_query_groups": 2,
        "group_query_attention": True,
    }

    def read(data: bytes) -> None:
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            return
        torch.save(
            {
                "args": argparse.Namespace(**content) if isinstance(content, dict) else content,
                "iteration": 3,
            },
            directory / "common.pt",
        )
        open_megatron(directory)

    check_reader([json.dumps(arguments).encode()], read, examples)


@fuzzed
def test_objects_of_torch_save_are_read(examples, origin, tmp_path):
    directory = Path(shutil.copytree(origin / "runs" / "iter_0000000", tmp_path / "x"))
    (directory / "manifest.json").unlink(missing_ok=True)
    path = directory / "common.pt"
    torch.save(
        {
            "args": argparse.Namespace(num_layers=4, hidden_size=64, num_attention_heads=4),
            "x": torch.ones(3),
        },
        path,
    )

    def read(data: bytes) -> None:
        path.write_bytes(data)
        open_megatron(directory)

    check_reader([path.read_bytes()], read, examples)


@fuzzed
def test_the_object_that_all_ranks_share_is_read(examples, tmp_path):
    arguments = argparse.Namespace(num_layers=4, hidden_size=64, num_attention_heads=4)
    embedding = torch.ones(8, 4)
    rectangle = ("__1_0.distcp", (0, 0), (8, 4))
    write_torch_dist(
        tmp_path / "x",
        {"embedding.word_embeddings.weight": (embedding, [rectangle])},
        {COMMON_OBJECT: [{"args": arguments, "x": torch.ones(3)}]},
    )
    path = tmp_path / "x" / "__0_0.distcp"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        open_megatron(tmp_path / "x")

    check_reader([path.read_bytes()], read, examples)
