"""The data's identity in a checkpoint: every change is detected and described, moving is none."""

import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from megatron_sorted.data import identity
from megatron_sorted.data.identity import data_identity, describe_changes, fingerprint
from megatron_sorted.data.indexed import Documents, IndexedWriter
from megatron_sorted.errors import DataError
from megatron_sorted.settings.run import Settings


def write(prefix, tokens, lengths):
    with IndexedWriter(str(prefix), np.uint16, with_modes=False) as writer:
        writer.append(
            Documents(
                np.array(tokens),
                np.array(lengths),
                np.ones(len(lengths)),
                np.ones(len(lengths), int),
            )
        )
    return str(prefix)


@pytest.fixture
def run(tmp_path):
    """Return a run on a blend of two files."""
    a, b = write(tmp_path / "a", range(9), [4, 5]), write(tmp_path / "b", range(20, 26), [6])
    return Settings(data_path=("0.3", a, "0.7", b), seq_length=4, vocab_size=99)


def changes(before: Settings, after: Settings) -> list[str]:
    """Return the differences, with the first identity stored as in a checkpoint."""
    return describe_changes(json.loads(json.dumps(data_identity(before))), data_identity(after))


def test_content_of_the_identity(run, tmp_path):
    identity = data_identity(run)
    contents = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    prints = {
        name: {
            "bytes": len(data),
            "sha256": hashlib.sha256(f"{len(data)}\n".encode() + data).hexdigest(),
        }
        for name, data in contents.items()
    }
    assert identity == {
        "sample_order": 1,
        "mock": False,
        "seed": 1234,
        "seq_length": 4,
        "training_share": 0.98,
        "files": [
            {"name": "a", "weight": 0.3, "idx": prints["a.idx"], "bin": prints["a.bin"]},
            {"name": "b", "weight": 0.7, "idx": prints["b.idx"], "bin": prints["b.bin"]},
        ],
    }
    plain = data_identity(replace(run, data_path=run.data_path[1::2], valid_data_path=("v",)))
    assert [file["weight"] for file in plain["files"]] == [None, None] and plain[
        "training_share"
    ] == 1.0
    assert data_identity(Settings(mock_data=True, vocab_size=9, seed=5)) == {
        "sample_order": 1,
        "mock": True,
        "seed": 5,
        "seq_length": 256,
        "training_share": None,
        "files": [],
    }


def test_moving_renaming_or_scaling_weights_changes_nothing(run, tmp_path):
    before = data_identity(run)
    assert changes(run, run) == []
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("a.idx", "a.bin"):
        shutil.copy(tmp_path / name, moved / name)
        shutil.copy(tmp_path / name, moved / name.replace("a", "c"))
    for data_path in (
        ("3", str(moved / "a"), "7", run.data_path[3]),
        ("30", str(moved / "c"), "70", run.data_path[3]),
    ):
        assert describe_changes(before, data_identity(replace(run, data_path=data_path))) == []
    assert (
        changes(
            run,
            replace(
                run, split="49,1", micro_batch_size=7, valid_data_path=(), test_data_path=("t",)
            ),
        )
        == []
    )


def test_each_change_is_described(run, tmp_path):
    _, a, _, b = run.data_path
    c = write(tmp_path / "c", range(30, 40), [10])
    assert changes(run, replace(run, seed=1, seq_length=8)) == [
        "--seed 1234 -> 1",
        "--seq-length 4 -> 8",
    ]
    assert changes(run, replace(run, split="1,1")) == [
        "training share of each file (--split, --valid-data-path) 0.98 -> 0.5"
    ]
    assert changes(run, replace(run, data_path=("0.5", a, "0.7", b))) == ["weight of a 0.3 -> 0.5"]
    assert changes(run, replace(run, data_path=("0.3", a, "0.7", b, "0.1", c))) == ["c was added"]
    assert changes(run, replace(run, data_path=("0.3", a, "0.6", b, "0.1", c))) == [
        "c was added",
        "weight of b 0.7 -> 0.6",
    ]
    assert changes(run, replace(run, data_path=("1", b))) == [
        "a was removed",
        "weight of b 0.7 -> 1",
    ]
    assert changes(run, replace(run, data_path=(a, b))) == [
        "weight of a 0.3 -> none",
        "weight of b 0.7 -> none",
    ]
    assert changes(run, replace(run, data_path=("0.7", b, "0.3", a))) == [
        "order of files a, b -> b, a"
    ]
    assert changes(run, replace(run, data_path=("0.3", c, "0.7", b))) == [
        "a was removed",
        "c was added",
    ]
    assert changes(run, replace(run, data_path=(), mock_data=True)) == [
        "--mock-data false -> true",
        "training share of each file (--split, --valid-data-path) 0.98 -> none",
        "a was removed",
        "b was removed",
    ]
    older = {**data_identity(run), "sample_order": 0}
    assert describe_changes(older, data_identity(run)) == ["sample order of version 0 -> 1"]


def test_changed_content_is_described(run, tmp_path):
    before = data_identity(run)
    write(tmp_path / "a", [0, 1, 2, 3, 4, 5, 6, 7, 99], [4, 5])
    now = data_identity(run)
    old, new = (identity["files"][0]["bin"]["sha256"][:8] for identity in (before, now))
    assert (
        describe_changes(before, now)
        == [f"a.bin: content differs (fingerprint {old}.. -> {new}..)"]
        and old != new
    )
    write(tmp_path / "a", range(9), [5, 4])
    assert [line[:23] for line in describe_changes(before, data_identity(run))] == [
        "a.idx: content differs "
    ]
    write(tmp_path / "a", range(10), [5, 5])
    lines = describe_changes(before, data_identity(run))
    assert len(lines) == 2 and lines[1].startswith(
        "a.bin: content differs (18 -> 20 bytes, fingerprint "
    )


def test_files_of_one_name_in_several_folders(run, tmp_path):
    en, mk = (
        write(tmp_path / folder / "train", tokens, [4])
        for folder, tokens in (("en", range(4)), ("mk", range(4, 8)))
    )
    both = replace(run, data_path=(en, mk))
    assert changes(both, both) == [] and changes(both, replace(run, data_path=(mk, en))) == [
        "order of files train, train -> train, train"
    ]
    assert changes(both, replace(run, data_path=(en,))) == ["train was removed"]


def test_large_files_are_read_in_blocks(tmp_path, monkeypatch):
    for name, value in {"WHOLE_BYTES": 1000, "NUM_BLOCKS": 10, "BLOCK_BYTES": 100}.items():
        monkeypatch.setattr(identity, name, value)
    path = tmp_path / "large.bin"
    data = bytearray(
        np.arange(5000, dtype=np.uint16).tobytes()
    )  # blocks begin at 0, 1100, 2200 ... 9900
    path.write_bytes(data)
    assert (
        fingerprint(path)["sha256"]
        == hashlib.sha256(
            b"10000\n" + b"".join(data[n * 1100 : n * 1100 + 100] for n in range(10))
        ).hexdigest()
    )

    def seen(offset: int, ending: str = "bin") -> bool:
        other = path.with_suffix(f".{ending}")
        other.write_bytes(data)
        before = fingerprint(other)
        other.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
        return fingerprint(other) != before

    assert [seen(offset) for offset in (0, 99, 100, 1099, 1100, 9899, 9900, 9999)] == [
        True,
        True,
        False,
        False,
        True,
        False,
        True,
        True,
    ]
    assert seen(100, "idx")
    before = fingerprint(path)
    path.write_bytes(data[:3001] + data[3000:-1])  # shifted by one byte, same size
    assert fingerprint(path) != before


def test_a_file_that_cannot_be_read(run, tmp_path):
    (tmp_path / "b.bin").unlink()
    with pytest.raises(DataError, match=r"b\.bin: cannot be read \(No such file"):
        data_identity(run)
