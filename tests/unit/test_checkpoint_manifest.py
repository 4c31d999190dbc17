"""A checkpoint's manifest: what it holds, and every kind of damage found by name."""

import hashlib
import json
import re

import pytest

from megatron_sorted.checkpoint.manifest import (
    MANIFEST,
    ROPE_FIELDS,
    FileRecord,
    Progress,
    check_same_shape,
    check_sizes,
    find_damage,
    manifest_text,
    network_shape,
    read_manifest,
    record_file,
)
from megatron_sorted.errors import CheckpointError
from megatron_sorted.settings.run import Settings

CONTENT = {"__0_0.distcp": b"weights" * 1000, "tokenizer/t.model": b"words"}


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    for name, content in CONTENT.items():
        (tmp_path / name).write_bytes(content)
    files = {name: record_file(tmp_path / name) for name in CONTENT}
    (tmp_path / MANIFEST).write_text(
        manifest_text(
            {"run_id": "ab", "exits": {"depths": [1, 2]}, "name": "Ö"}, Progress(7, 56), files
        )
    )
    return tmp_path


def test_a_manifest_reads_back_as_written(directory):
    manifest = read_manifest(directory)
    assert (manifest["format"], manifest["run_id"], manifest["name"]) == (2, "ab", "Ö")
    assert manifest["progress"] == {"step": 7, "samples": 56}
    assert manifest["files"]["__0_0.distcp"] == {
        "bytes": 7000,
        "sha256": hashlib.sha256(CONTENT["__0_0.distcp"]).hexdigest(),
    }
    check_sizes(directory, manifest)
    assert find_damage(directory, manifest, CONTENT) == []


def test_files_larger_than_a_block_are_hashed_whole(tmp_path):
    content = bytes(range(256)) * 10_000
    (tmp_path / "f").write_bytes(content)
    assert record_file(tmp_path / "f") == FileRecord(2_560_000, hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "manifest.json is missing"),
        (lambda path: path.write_text(path.read_text()[:-40]), "not JSON (Unterminated string"),
        (
            lambda path: path.write_text("[]"),
            "format None, but this version reads format 2. It is not one of ours.",
        ),
        (
            lambda path: path.write_text(path.read_text().replace('"format": 2', '"format": 3')),
            "format 3, but this version reads format 2. A newer megatron_sorted wrote it: update.",
        ),
        (
            lambda path: path.write_text(path.read_text().replace('"format": 2', '"format": "x"')),
            "format x, but",
        ),
        (
            lambda path: path.write_text(path.read_text().replace('"step": 7', '"step": 9')),
            "does not match its own hash",
        ),
    ],
)
def test_a_damaged_manifest_is_refused(directory, spoil, message):
    spoil(directory / MANIFEST)
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        read_manifest(directory)
    assert str(directory) in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "No such file or directory."),
        (
            lambda path: path.write_bytes(b"x" * 6999),
            "6999 bytes where the manifest says 7000; it is truncated.",
        ),
        (
            lambda path: path.write_bytes(b"x" * 7001),
            "7001 bytes where the manifest says 7000; it is too long.",
        ),
    ],
)
def test_files_of_another_size_are_named_without_reading_them(directory, spoil, message):
    manifest = read_manifest(directory)
    spoil(directory / "__0_0.distcp")
    with pytest.raises(CheckpointError) as error:
        check_sizes(directory, manifest)
    assert str(error.value) == f"{directory / '__0_0.distcp'}: {message}"


def test_a_flipped_bit_is_detected(directory):
    manifest, path = read_manifest(directory), directory / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[3500] ^= 1
    path.write_bytes(content)
    check_sizes(directory, manifest)
    (problem,) = find_damage(directory, manifest, CONTENT)
    on_disk, stated = (
        hashlib.sha256(content).hexdigest(),
        manifest["files"]["__0_0.distcp"]["sha256"],
    )
    assert problem == f"{path}: damaged (sha256 {on_disk[:12]}, the manifest says {stated[:12]})"
    (directory / "tokenizer" / "t.model").unlink()
    assert find_damage(directory, manifest, ["tokenizer/t.model"]) == [
        f"{directory / 'tokenizer/t.model'}: not readable (No such file or directory)"
    ]


def test_exits_count_only_where_they_own_parameters(tmp_path):
    manifest = {"shape": {"exit_layer_nums": [2, 4]}}
    check_same_shape(tmp_path, manifest, Settings(), {"exit_layer_nums": [1, 4]})
    with pytest.raises(
        CheckpointError,
        match=r"--exit-layer-nums: \[2, 4\] in the checkpoint, \[1, 4\] in this run\. ",
    ):
        check_same_shape(
            tmp_path,
            manifest,
            Settings(untie_exit_output_weights=True),
            {"exit_layer_nums": [1, 4]},
        )


def test_a_field_that_an_older_version_did_not_know_had_its_default(tmp_path):
    shape = network_shape(Settings(norm_epsilon=1e-6), 100)
    old = {
        name: value
        for name, value in shape.items()
        if name not in ROPE_FIELDS and not name.startswith(("sliding", "norm_eps"))
    }
    assert len(shape) - len(old) == len(ROPE_FIELDS) + 2
    manifest = {
        "shape": old,
        "settings": {"norm_epsilon": 1e-6},
    }  # it stood among the settings before it was checked
    check_same_shape(tmp_path, manifest, Settings(), shape)
    for changes, message in (
        ({"sliding_window": 64}, "--sliding-window: None in the checkpoint, 64 in this run"),
        ({"norm_epsilon": 1e-5}, "--norm-epsilon: 1e-06 in the checkpoint, 1e-05 in this run"),
    ):
        with pytest.raises(CheckpointError) as error:
            check_same_shape(tmp_path, manifest, Settings(), {**shape, **changes})
        assert str(error.value).startswith(f"{tmp_path}: made with other sizes. {message}. ")


YARN = {
    "rope_scaling_type": "yarn",
    "rope_scaling_factor": 4.0,
    "rope_scaling_original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("changes", "is_named"),
    [
        ({"use_rope_scaling": True}, True),
        ({"rotary_seq_len_interpolation_factor": 2.0}, True),
        (YARN, True),
        ({"rope_resonance": True}, True),
        ({"rope_scaling_type": "default"}, True),
        ({}, False),
    ],
)
def test_another_rotary_scaling_is_refused_unless_a_run_of_weights_alone_names_it(
    tmp_path, changes, is_named
):
    """The checkpoint is one of 0.13, which wrote factors even where nothing was scaled."""
    scaled = {"use_rope_scaling": not changes or "rope_scaling_type" in changes}
    settings = {**scaled, "rope_scaling_factor": 8.0, "rope_scaling_low_freq_factor": 1.0}
    shape = network_shape(Settings(), 100)
    old = {name: value for name, value in shape.items() if name not in ROPE_FIELDS}
    manifest, now = {"shape": old, "settings": settings}, Settings(**changes)
    was = "llama3 x 8 from 8,192 tokens" if scaled["use_rope_scaling"] else "default"
    with pytest.raises(CheckpointError) as error:
        check_same_shape(tmp_path, manifest, now, network_shape(now, 100))
    assert f"type and its parameters: {was} in the checkpoint, " in str(error.value)
    assert "--finetune" in str(error.value)
    arguments = (tmp_path, manifest, now, network_shape(now, 100), True)
    if is_named:
        check_same_shape(*arguments)
    else:  # a run that does not say so would forget the model's scaling
        with pytest.raises(CheckpointError, match="default in this run"):
            check_same_shape(*arguments)


def test_two_spellings_of_one_rotary_scaling_are_the_same(tmp_path):
    manifest = {"shape": {}, "settings": {"use_rope_scaling": True}}
    now = Settings(rope_scaling_type="llama3", rope_scaling_factor=8.0)
    check_same_shape(tmp_path, manifest, now, {})


def test_the_own_hash_is_that_of_plain_json(directory):
    manifest = json.loads((directory / MANIFEST).read_text())
    own = manifest.pop("sha256")
    assert own == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def test_a_manifest_that_lists_no_files_is_none(directory):
    stated = json.loads((directory / MANIFEST).read_text())
    del stated["files"], stated["sha256"]
    stated["sha256"] = hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()
    (directory / MANIFEST).write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match="files is missing or not of its kind"):
        read_manifest(directory)
