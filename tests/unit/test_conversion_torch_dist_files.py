"""Tensors of torch_dist checkpoints from any partition; errors name what is missing."""

import argparse
import pickle

import pytest
import torch

from megatron_sorted.conversion.megatron.torch_dist_files import TorchDistFiles
from megatron_sorted.errors import CheckpointError
from tests.support.stored_files import write_torch_dist

EMBEDDING = torch.arange(48.0).reshape(8, 6)
STACKED = torch.arange(3 * 4 * 6, dtype=torch.int32).reshape(3, 4, 6)
NORMS = torch.arange(18.0).reshape(3, 6).bfloat16()
TENSORS = {
    "embedding.word_embeddings.weight": (
        EMBEDDING,
        [("__1_0.distcp", (4, 0), (4, 6)), ("__0_0.distcp", (0, 0), (4, 6))],
    ),
    # Layer 0 in quarters, 1 and 2 together in one part for each half of the columns.
    "decoder.layers.mlp.linear_fc2.weight": (
        STACKED,
        [
            *((f"__{n}_1.distcp", (0, 2 * (n // 2), 3 * (n % 2)), (1, 2, 3)) for n in range(4)),
            ("__0_0.distcp", (1, 0, 0), (2, 4, 3)),
            ("__1_0.distcp", (1, 0, 3), (2, 4, 3)),
        ],
    ),
    "decoder.layers.input_layernorm.weight": (
        NORMS,
        [("__0_0.distcp", (n, 0), (1, 6)) for n in range(3)],
    ),
    "decoder.layers.2.pre_mlp_layernorm.weight": (NORMS[2], [("__0_0.distcp", (0,), (6,))]),
    "decoder.final_layernorm.weight": (NORMS[1], [("__0_0.distcp", (0,), (6,))]),
    "exit_norms.2.weight": (NORMS[0], [("__0_0.distcp", (0,), (6,))]),
    "optimizer.state.exp_avg.embedding.word_embeddings.weight": (
        EMBEDDING,
        [("__1_1.distcp", (0, 0), (8, 6))],
    ),
}
OFFERED = {
    "embedding.word_embeddings.weight": EMBEDDING,
    **{f"decoder.layers.{n}.mlp.linear_fc2.weight": STACKED[n] for n in range(3)},
    **{
        f"decoder.layers.{n}.self_attention.linear_qkv.layer_norm_weight": NORMS[n]
        for n in range(3)
    },
    "decoder.layers.2.mlp.linear_fc1.layer_norm_weight": NORMS[2],
    "decoder.final_layernorm.weight": NORMS[1],
    "exit_norms.2.weight": NORMS[0],
}


def test_tensors_are_whole_for_every_partition(tmp_path):
    write_torch_dist(
        tmp_path,
        TENSORS,
        {
            "decoder.layers.mlp.linear_fc2._extra_state/shard_0_3": None,
            "random_state/shard_0.0_1.1": [1],
        },
    )
    files = TorchDistFiles(tmp_path)
    assert files.tensors.keys() == OFFERED.keys()
    for name, info in files.tensors.items():
        read = files.read(name)
        assert (
            torch.equal(read, OFFERED[name])
            and read.dtype == info.dtype
            and tuple(read.shape) == info.shape
        ), name
        assert read.untyped_storage().nbytes() == info.num_bytes, (
            f"{name} keeps more in memory than itself"
        )


def test_tensors_are_listed_in_the_order_of_the_files(tmp_path):
    write_torch_dist(tmp_path, TENSORS)
    order = list(TorchDistFiles(tmp_path).tensors)
    assert (
        order[0] == "embedding.word_embeddings.weight"
        and order[-1] == "decoder.layers.0.mlp.linear_fc2.weight"
    )
    assert order[1:3] == [
        "decoder.layers.1.mlp.linear_fc2.weight",
        "decoder.layers.2.mlp.linear_fc2.weight",
    ]


def without(name: str, rectangle: int) -> dict:
    whole, rectangles = TENSORS[name]
    return {**TENSORS, name: (whole, rectangles[:rectangle] + rectangles[rectangle + 1 :])}


@pytest.mark.parametrize(
    ("name", "rectangle", "offered"),
    [
        ("embedding.word_embeddings.weight", 1, "embedding.word_embeddings.weight"),
        ("decoder.layers.mlp.linear_fc2.weight", 2, "decoder.layers.0.mlp.linear_fc2.weight"),
        ("decoder.layers.mlp.linear_fc2.weight", 5, "decoder.layers.1.mlp.linear_fc2.weight"),
    ],
)
def test_a_missing_part_is_refused(name, rectangle, offered, tmp_path):
    write_torch_dist(tmp_path, without(name, rectangle))
    files = TorchDistFiles(tmp_path)
    with pytest.raises(CheckpointError, match=f"{offered}: parts of it are in no file"):
        files.read(offered)


def test_a_missing_layer_is_refused_on_opening(tmp_path):
    write_torch_dist(tmp_path, without("decoder.layers.input_layernorm.weight", 1))
    with pytest.raises(
        CheckpointError,
        match=r"decoder\.layers\.1\.self_attention\.linear_qkv\.layer_norm_weight: parts of it",
    ):
        TorchDistFiles(tmp_path)


def test_overlapping_parts_do_not_hide_a_missing_one(tmp_path):
    rectangles = [("__0_0.distcp", (0, 0), (4, 6)), ("__0_0.distcp", (3, 0), (4, 6))]
    write_torch_dist(tmp_path, {"embedding.word_embeddings.weight": (EMBEDDING, rectangles)})
    files = TorchDistFiles(tmp_path)
    with pytest.raises(CheckpointError, match="parts of it are in no file"):
        files.read("embedding.word_embeddings.weight")


def test_missing_short_and_foreign_files_are_refused(tmp_path):
    write_torch_dist(tmp_path, TENSORS)
    path = tmp_path / "__1_0.distcp"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(
        CheckpointError,
        match=r"__1_0\.distcp has \d+ bytes, but decoder\.layers\.mlp\.linear_fc2\.weight lies up "
        r"to",
    ):
        TorchDistFiles(tmp_path)
    path.write_bytes(bytes(len(content)))
    with pytest.raises(
        CheckpointError, match=r"embedding\.word_embeddings\.weight in __1_0\.distcp: "
    ):
        TorchDistFiles(tmp_path).read("embedding.word_embeddings.weight")
    path.unlink()
    with pytest.raises(
        CheckpointError,
        match=r"__1_0\.distcp is missing; it holds embedding\.word_embeddings\.weight",
    ):
        TorchDistFiles(tmp_path)


def test_files_of_another_save_are_refused(tmp_path):
    write_torch_dist(tmp_path, TENSORS)
    other = {
        **TENSORS,
        "embedding.word_embeddings.weight": (
            EMBEDDING.double().int(),
            TENSORS["embedding.word_embeddings.weight"][1],
        ),
    }
    write_torch_dist(tmp_path / "other", other)
    (tmp_path / "__1_0.distcp").write_bytes((tmp_path / "other" / "__1_0.distcp").read_bytes())
    with pytest.raises(
        CheckpointError,
        match=r"torch\.int32 \[4, 6\] lies where the metadata says torch\.float32 \[4, 6\]",
    ):
        TorchDistFiles(tmp_path).read("embedding.word_embeddings.weight")


def test_two_names_of_one_weight_are_refused(tmp_path):
    twice = {
        **TENSORS,
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (
            NORMS,
            TENSORS["decoder.layers.input_layernorm.weight"][1],
        ),
    }
    write_torch_dist(tmp_path, twice)
    with pytest.raises(CheckpointError, match="layer_norm_weight is there twice"):
        TorchDistFiles(tmp_path)


class Runs:
    """An object that prints when a plain pickle reads it."""

    def __reduce__(self):
        return print, ("never",)


def test_common_files_may_hold_plain_values_only(tmp_path, capsys):
    write_torch_dist(tmp_path, TENSORS)
    files = TorchDistFiles(tmp_path)
    torch.save({"args": argparse.Namespace(a=1), "iteration": 3}, tmp_path / "common.pt")
    assert files.common_states()["common.pt"] == {"args": argparse.Namespace(a=1), "iteration": 3}
    torch.save({"args": Runs()}, tmp_path / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt: refused: it asks for .*print"):
        files.common_states()
    torch.save({"args": Runs()}, tmp_path / "common.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"common\.pt: refused or damaged .*print"):
        files.common_states()
    assert capsys.readouterr().out == ""
    assert (
        pickle.loads(pickle.dumps(Runs())) is None and capsys.readouterr().out == "never\n"
    )  # a plain pickle does run it


def test_an_empty_checkpoint_is_refused(tmp_path):
    write_torch_dist(tmp_path, {"optimizer.x": TENSORS["exit_norms.2.weight"]})
    with pytest.raises(CheckpointError, match="holds no weights"):
        TorchDistFiles(tmp_path)


def test_a_flipped_bit_is_reported_with_the_name_of_its_tensor(tmp_path):
    write_torch_dist(tmp_path, TENSORS)
    path = tmp_path / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[content.index(EMBEDDING[5].numpy().tobytes()) + 9] ^= 4
    path.write_bytes(content)
    files = TorchDistFiles(tmp_path)
    for name in files.tensors.keys() - {"embedding.word_embeddings.weight"}:
        files.read(name)
    with pytest.raises(
        CheckpointError,
        match=r"word_embeddings.weight in __1_0.distcp: the bytes from \d+ on do not match their "
        r"checksum",
    ):
        files.read("embedding.word_embeddings.weight")


def test_pieces_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        write_torch_dist(tmp_path, TENSORS)
    finally:
        torch.serialization.set_crc32_options(True)
    files = TorchDistFiles(tmp_path)
    assert all(torch.equal(files.read(name), OFFERED[name]) for name in files.tensors)
