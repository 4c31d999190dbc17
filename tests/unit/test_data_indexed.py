"""Indexed files: byte equality with Megatron's builder, and every kind of damage."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_sorted.data.indexed import (
    Documents,
    IndexedWriter,
    check_indexed,
    open_indexed,
    token_dtype,
)
from megatron_sorted.errors import DataError

# Three documents: prompt 5 6 7 / response 8 9; prompt 1 / response 2 2 / prompt 3 / response 4;
# response 11 only.
TOKENS = [5, 6, 7, 8, 9, 1, 2, 2, 3, 4, 11]
LENGTHS, MODES, NUM_SEQUENCES = [3, 2, 1, 2, 1, 1, 1], [0, 1, 0, 1, 0, 1, 1], [2, 4, 1]


def documents(tokens, lengths, modes, num_sequences):
    return Documents(
        np.array(tokens),
        np.array(lengths, np.int32),
        np.array(modes, np.int8),
        np.array(num_sequences, np.int32),
    )


@pytest.fixture
def instruction(tmp_path):
    prefix = str(tmp_path / "ours")
    with IndexedWriter(prefix, np.uint16, with_modes=True) as writer:
        writer.append(documents(TOKENS[:5], LENGTHS[:2], MODES[:2], NUM_SEQUENCES[:1]))
        writer.append(documents(TOKENS[5:], LENGTHS[2:], MODES[2:], NUM_SEQUENCES[1:]))
    return prefix


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("with_modes", [True, False])
def test_bytes_equal_megatrons_builder(tmp_path, dtype, with_modes):
    lengths = LENGTHS if with_modes else [5, 5, 1]
    num_sequences = NUM_SEQUENCES if with_modes else [1, 1, 1]
    modes = MODES if with_modes else [1, 1, 1]
    with IndexedWriter(str(tmp_path / "ours"), dtype, with_modes) as writer:
        writer.append(documents(TOKENS, lengths, modes, num_sequences))
    builder = IndexedDatasetBuilder(
        str(tmp_path / "theirs.bin"), dtype=dtype, multimodal=with_modes
    )
    token = sequence = 0
    for count in num_sequences:
        size = sum(lengths[sequence : sequence + count])
        builder.add_document(
            torch.tensor(TOKENS[token : token + size]),
            lengths[sequence : sequence + count],
            modes[sequence : sequence + count] if with_modes else None,
        )
        token, sequence = token + size, sequence + count
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (
            tmp_path / f"theirs.{ending}"
        ).read_bytes()


def test_megatron_reads_our_file(instruction):
    dataset = IndexedDataset(instruction, multimodal=True)
    assert dataset.document_indices.tolist() == [0, 2, 6, 7]
    assert [(tokens.tolist(), int(mode)) for tokens, mode in (dataset[i] for i in range(7))] == [
        ([5, 6, 7], 0),
        ([8, 9], 1),
        ([1], 0),
        ([2, 2], 1),
        ([3], 0),
        ([4], 1),
        ([11], 1),
    ]


def test_documents_and_what_is_trained(instruction):
    file = open_indexed(instruction)
    assert file.num_documents == 3 and file.document_lengths().tolist() == [5, 5, 1]
    assert [file.document(i).tolist() for i in range(3)] == [[5, 6, 7, 8, 9], [1, 2, 2, 3, 4], [11]]
    assert [file.trained(i).tolist() for i in range(3)] == [
        [False, False, False, True, True],
        [False, True, True, False, True],
        [True],
    ]


def test_text_has_no_modes_and_is_all_trained(tmp_path):
    prefix = str(tmp_path / "text")
    with IndexedWriter(prefix, np.int32, with_modes=False) as writer:
        writer.append(documents([70000, 2, 3], [2, 1], [1, 1], [1, 1]))
    assert not check_indexed(prefix).has_modes
    file = open_indexed(prefix)
    assert (
        file.modes is None
        and file.document(0).tolist() == [70000, 2]
        and file.trained(0).tolist() == [True, True]
    )


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_missing_file_is_named(instruction, ending):
    Path(f"{instruction}.{ending}").unlink()
    with pytest.raises(DataError, match=rf"ours\.{ending}: no such file.*megatron-sorted prepare"):
        open_indexed(instruction)


# .bin: 11 tokens x 2 = 22 bytes. .idx: 34 + 7 x 12 + 4 x 8 = 150 bytes, 157 with modes.
@pytest.mark.parametrize(
    ("ending", "size", "message"),
    [
        ("bin", 0, "0 bytes.*11 tokens of 2 bytes = 22 bytes.*truncated"),
        ("bin", 21, "21 bytes.*= 22 bytes.*truncated"),
        ("bin", 23, "23 bytes.*= 22 bytes.*too long"),
        ("idx", 0, "0 bytes, but the header alone takes 34"),
        ("idx", 33, "33 bytes, but the header alone takes 34"),
        (
            "idx",
            34,
            r"34 bytes, but 7 sequences and 3 documents take 150 \(157 with modes\).*truncated",
        ),
        ("idx", 149, "149 bytes.*truncated"),
        ("idx", 150, "several sequences but no modes.*7 bytes may be missing"),
        ("idx", 156, "156 bytes.*damaged"),
        ("idx", 158, "158 bytes.*damaged"),
    ],
)
def test_truncated_or_oversized(instruction, ending, size, message):
    path = Path(f"{instruction}.{ending}")
    assert path.stat().st_size == {"bin": 22, "idx": 157}[ending]
    path.write_bytes((path.read_bytes() + b"\0" * 10)[:size])
    with pytest.raises(DataError, match=rf"ours\.{ending}: .*{message}"):
        open_indexed(instruction)


@pytest.mark.parametrize(
    ("offset", "patch", "message"),
    [
        (0, b"X", "starts with"),
        (9, struct.pack("<Q", 2), "format version 2"),
        (17, b"\x06", "token type code 6"),
        (
            34,
            struct.pack("<ii", 4, 1),
            "contradict",
        ),  # lengths 3, 2 -> 4, 1: the sum, but not the offsets, still fits
        (34 + 7 * 12, struct.pack("<q", 1), "boundaries"),
        (150, b"\x02", r"modes \[0, 1, 2\]"),
    ],
)
def test_damaged_index(instruction, offset, patch, message):
    path = Path(f"{instruction}.idx")
    data = bytearray(path.read_bytes())
    data[offset : offset + len(patch)] = patch
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        open_indexed(instruction)


def test_file_without_tokens(tmp_path):
    with IndexedWriter(str(tmp_path / "none"), np.uint16, with_modes=True):
        pass
    with pytest.raises(DataError, match="no tokens"):
        open_indexed(str(tmp_path / "none"))


def test_failure_leaves_earlier_files_and_nothing_half_written(instruction, tmp_path):
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyError), IndexedWriter(instruction, np.uint16, with_modes=True) as writer:
        writer.append(documents([1], [1], [1], [1]))
        raise KeyError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_token_type_follows_the_vocabulary():
    assert token_dtype(65499) == np.uint16 and token_dtype(65500) == np.int32
