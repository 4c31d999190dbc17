"""The conversion commands on bad input: exit code 1, one line of error, nothing left on disk."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sorted.commands import convert
from megatron_sorted.commands import extract as extract_submodel
from megatron_sorted.conversion.importing import import_model
from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.conversion.origins import RequestedExits
from megatron_sorted.conversion.writing import WriteOptions
from megatron_sorted.errors import SortedError
from tests.support.commands import run_command
from tests.support.megatron_files import make_truth, save_as_megatron
from tests.support.model_directories import save_model
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny
from tests.system.conftest import ROOT

Q_PROJ, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def origins(tmp_path_factory) -> Path:
    """Return a folder with a model in one file, in three, tied, and a checkpoint of the first."""
    folder = tmp_path_factory.mktemp("origins")
    save_model(folder / "single", "llama3")
    save_model(folder / "sharded", "llama3", num_shards=3)
    save_model(folder / "tied", "qwen2", tied=True)
    import_model(
        open_model(folder / "single"),
        folder / "checkpoint",
        RequestedExits((1, 2)),
        WriteOptions(verify=False),
    )
    return folder


def change_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(directory: Path, change) -> None:
    """Rewrite the only file of a model after ``change(tensors)``."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def name_twice(directory: Path) -> None:
    """Copy a tensor into a second shard without a contradiction to the index."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in sorted(set(index.values())) if file != index[Q_PROJ])
    first, second = load_file(directory / index[Q_PROJ]), load_file(directory / other)
    save_file({**second, Q_PROJ: first[Q_PROJ]}, directory / other, {"format": "pt"})


def lose_shard(directory: Path) -> None:
    sorted(directory.glob("model-*.safetensors"))[1].unlink()


def only_pickle(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def only_notes(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    (directory / "notes.txt").write_text("x")


def flip_bit(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 16
    path.write_bytes(content)


def flip_bit_of_embedding(directory: Path) -> None:
    path, tensor = (
        directory / "iter_0000000" / "__0_0.distcp",
        open_model(directory).source.read("embedding.word_embeddings.weight"),
    )
    content = bytearray(path.read_bytes())
    content[content.index(tensor[57].numpy().tobytes()) + 6] ^= 64
    path.write_bytes(content)


# {name: (origin, the change that makes it faulty, parts of the message)}
FAULTS = {
    "no model": ("single", only_notes, ["neither a Hugging Face model", "notes.txt"]),
    "half downloaded": (
        "sharded",
        lose_shard,
        ["and 1 are missing: model-00002-of-", "did not finish; fetch them"],
    ),
    "unsupported architecture": (
        "single",
        lambda d: change_config(d, model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"]),
        ["'gpt_neox' is not supported", "llama (LlamaForCausalLM), mistral", "qwen2", "qwen3"],
    ),
    "not a language model": (
        "single",
        lambda d: change_config(d, architectures=["LlamaForSequenceClassification"]),
        ["['LlamaForSequenceClassification'] is not a language model", "Supported are llama"],
    ),
    "too few layers in the config": (
        "single",
        lambda d: change_config(d, num_hidden_layers=3, layer_types=None),
        ["unknown: model.layers.3.input_layernorm.weight", "fetch the files again, or correct"],
    ),
    "too many layers in the config": (
        "single",
        lambda d: change_config(d, num_hidden_layers=5, layer_types=None),
        ["missing: model.layers.4."],
    ),
    "another hidden size": (
        "single",
        lambda d: change_config(d, hidden_size=64, head_dim=16),
        ["model.embed_tokens.weight has shape [100, 32]", "config.json makes it [100, 64]"],
    ),
    "says tied and is not": (
        "single",
        lambda d: change_config(d, tie_word_embeddings=True),
        ["says tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight"],
    ),
    "says untied and is tied": (
        "tied",
        lambda d: change_config(d, tie_word_embeddings=False),
        ["1 missing: lm_head.weight"],
    ),
    "pickled weights": (
        "single",
        only_pickle,
        ["pytorch_model.bin", "A pickle can run any program", "safe_serialization=True"],
    ),
    "unknown tensor": (
        "single",
        lambda d: change_tensors(d, lambda t: t.update({"model.extra": torch.ones(3)})),
        ["1 unknown: model.extra"],
    ),
    "missing tensor": (
        "single",
        lambda d: change_tensors(d, lambda t: t.pop(UP)),
        [f"1 missing: {UP}"],
    ),
    "tensor twice": ("sharded", name_twice, [f"{Q_PROJ} occurs twice, in model-0000"]),
    "wrong shape": (
        "single",
        lambda d: change_tensors(d, lambda t: t.update({UP: torch.ones(48, 16)})),
        [f"{UP} has shape [48, 16]", "makes it [48, 32]"],
    ),
    "broken config": (
        "single",
        lambda d: (d / "config.json").write_text("{"),
        ["config.json: not JSON", "Fetch it again"],
    ),
    "damaged shard of a checkpoint": (
        "checkpoint",
        flip_bit_of_embedding,
        [
            "embedding.word_embeddings.weight in __0_0.distcp",
            "do not match their checksum",
            "Copy it again",
        ],
    ),
    "damaged manifest": (
        "checkpoint",
        lambda d: flip_bit(d / "iter_0000000" / "manifest.json", 0.6),
        ["manifest.json"],
    ),
    "damaged metadata": (
        "checkpoint",
        lambda d: flip_bit(d / "iter_0000000" / ".metadata", 0.5),
        [".metadata: damaged (sha256"],
    ),
    "damaged config in a checkpoint": (
        "checkpoint",
        lambda d: flip_bit(d / "iter_0000000" / "huggingface" / "config.json", 0.5),
        ["huggingface/config.json: damaged (sha256"],
    ),
    "cut off checkpoint": (
        "checkpoint",
        lambda d: os.truncate(d / "iter_0000000" / "__0_0.distcp", 5000),
        ["5000 bytes where", "truncated"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_model_is_refused_and_nothing_written(fault, origins, tmp_path):
    origin, spoil, parts = FAULTS[fault]
    shutil.copytree(origins / origin, tmp_path / "model")
    spoil(tmp_path / "model")
    commands = [
        (convert.main, ["export"]),
        (extract_submodel.main, ["--depth", "2"]),
        (convert.main, ["import"]),
    ]
    for main, arguments in commands:
        with pytest.raises(SortedError) as caught:
            main([*arguments, str(tmp_path / "model"), str(tmp_path / "out" / "made")])
        message = str(caught.value)
        assert "\n" not in message and str(tmp_path / "model") in message
        for part in parts:
            assert part in message, f"{part!r} is not in {message!r}"
        left = sorted(
            str(path.relative_to(tmp_path))
            for path in tmp_path.rglob("*")
            if "model" not in path.relative_to(tmp_path).parts
        )
        assert left in ([], ["out"]), left


def assert_one_line(done: subprocess.CompletedProcess, *parts: str) -> None:
    """Assert that a command ended with 1 and one line of error, after at most a progress bar."""
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    for part in parts:
        assert part in last, last


def test_an_existing_destination_is_kept(origins, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    assert_one_line(
        run_command(
            "tools/extract_submodel.py",
            "--depth",
            1,
            origins / "single",
            tmp_path / "out",
            cwd=tmp_path,
        ),
        f"{tmp_path / 'out'}: exists and is not empty",
        "--overwrite",
    )
    for arguments in (["import", origins / "single"], ["export", origins / "checkpoint"]):
        with pytest.raises(SortedError, match=r"exists and is not empty.*--overwrite"):
            convert.main([*map(str, arguments), str(tmp_path / "out")])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine.txt", "out"]


def test_a_failed_write_leaves_the_old_directory_and_nothing_new(origins, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine.txt").write_text("precious")
    for verb, origin, destination in (("import", "single", "new"), ("export", "checkpoint", "old")):
        done = run_command(
            "tools/convert.py",
            verb,
            origins / origin,
            tmp_path / destination,
            "--overwrite",
            "--no-verify",
            cwd=tmp_path,
            max_bytes_of_a_file=30_000,
        )
        assert_one_line(
            done,
            f"{tmp_path / destination}: could not be written (File too large); nothing was left "
            "there",
        )
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine.txt", "old"]


FULL_DISK = """\
mount -t tmpfs -o size={megabytes}m tmpfs {disk} || exit 99
mkdir {disk}/old; echo precious > {disk}/old/mine.txt
{python} -c 'import shutil, sys
from collections import namedtuple
shutil.disk_usage = lambda path: namedtuple("usage", "total used free")(1 << 40, 0, 1 << 40)
sys.argv[0] = "convert"
from megatron_sorted.commands import convert
from megatron_sorted.errors import SortedError
for verb, origin, place in (
    ("import", "big", "new"), ("export", "runs", "new"), ("export", "runs", "old")
):
    try:
        convert.main([verb, "{origins}/" + origin, "{disk}/" + place, "--overwrite", "--no-verify"])
    except SortedError as error:
        print("error:", error)
' || exit 98
echo "left:" $(cd {disk}; find . -type f -o -type d | sort)
cat {disk}/old/mine.txt
"""


def test_a_disk_that_fills_up_is_left_unchanged(tmp_path):
    from tests.support.hugging_face import make_model

    make_model("Llama", hidden_size=128, intermediate_size=512, vocab_size=1000).save_pretrained(
        tmp_path / "big"
    )
    import_model(
        open_model(tmp_path / "big"),
        tmp_path / "runs",
        RequestedExits(),
        WriteOptions(verify=False),
    )
    (tmp_path / "disk").mkdir()
    script = FULL_DISK.format(
        megabytes=2, disk=tmp_path / "disk", python=sys.executable, origins=tmp_path
    )
    try:
        done = subprocess.run(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
            capture_output=True,
            timeout=120,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode in (1, 99):
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()[-100:]}")
    assert done.returncode == 0, done.stdout + done.stderr
    errors = [line for line in done.stdout.splitlines() if line.startswith("error:")]
    assert len(errors) == 3, done.stdout
    assert all(
        "No space left on device" in line and "The disk is full: make room" in line
        for line in errors
    ), errors
    assert done.stdout.splitlines()[-2:] == ["left: . ./old ./old/mine.txt", "precious"]


SLOW = """\
import sys, time
from megatron_sorted.commands import convert
from megatron_sorted.conversion import report
def slow(title, num_bytes):
    print(title, flush=True)
    return lambda done: time.sleep(0.05)
report.progress_bars = slow
convert.main(sys.argv[1:])
"""


def kill_midway(*arguments: object) -> None:
    """Start a slow conversion and kill it in the middle."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert any(line.startswith("converting") for line in process.stdout)
    time.sleep(0.3)
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_killed_conversion_leaves_a_hidden_directory_that_the_next_one_removes(origins, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    kill_midway("export", origins / "checkpoint", tmp_path / "out", "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.writing", "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(SortedError, match="neither a Hugging Face model"):
        open_model(tmp_path / "out")
    convert.main(
        ["export", str(origins / "checkpoint"), str(tmp_path / "out"), "--overwrite", "--no-verify"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and open_model(
        tmp_path / "out"
    ).settings.num_layers == 4


def test_a_directory_renamed_before_a_kill_is_restored(origins, tmp_path):
    # killed between its two last steps, a conversion with --overwrite leaves the old directory
    # under a hidden name
    (tmp_path / ".out.removing").mkdir()
    (tmp_path / ".out.removing" / "mine.txt").write_text("precious")
    with pytest.raises(SortedError, match="exists and is not empty"):
        convert.main(["export", str(origins / "checkpoint"), str(tmp_path / "out")])
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


@pytest.fixture(scope="module")
def megatron(tmp_path_factory) -> Path:
    """Return checkpoints of megatron-core's GPTModel of two tensor ranks.

    The embedding has 104 rows for 100 tokens, a number that the checkpoints do not hold.
    """
    folder = tmp_path_factory.mktemp("megatron")
    network = {"untie_embeddings_and_output_weights": True}
    (truth,) = run_ranks(1, make_truth, tiny(**network), str(folder / "seed"))
    settings = tiny(tensor_model_parallel_size=2, make_vocab_size_divisible_by=4, **network)
    run_ranks(2, save_as_megatron, settings, str(folder / "seed"), str(folder), 300)
    torch.save(truth, folder / "truth.pt")
    return folder


@pytest.mark.parametrize("form", ["legacy", "stacked"])
def test_a_checkpoint_of_megatron_is_imported_and_exported(form, megatron, tmp_path, capsys):
    truth = torch.load(megatron / "truth.pt", weights_only=True)
    convert.main(
        [
            "import",
            str(megatron / form),
            str(tmp_path / "runs"),
            "--vocab-size",
            "100",
            "--exit-layer-nums",
            "2",
        ]
    )
    convert.main(["export", str(tmp_path / "runs"), str(tmp_path / "out")])
    convert.main(
        [
            "export",
            str(megatron / form),
            str(tmp_path / "direct"),
            "--vocab-size",
            "100",
            "--no-verify",
        ]
    )
    output = capsys.readouterr().out
    assert "vocabulary 100" in output and "plain PyTorch against transformers" in output
    theirs = load_file(tmp_path / "out" / "model.safetensors")
    direct = load_file(tmp_path / "direct" / "model.safetensors")
    assert theirs.keys() == direct.keys() and all(
        torch.equal(theirs[name], direct[name]) for name in theirs
    )
    assert torch.equal(
        theirs["model.embed_tokens.weight"], truth["embedding.word_embeddings.weight"][:100]
    )
    assert torch.equal(theirs["lm_head.weight"], truth["output_layer.weight"][:100])
    assert torch.equal(
        theirs["model.layers.2.mlp.down_proj.weight"],
        truth["decoder.layers.2.mlp.linear_fc2.weight"],
    )
    assert torch.equal(
        theirs["model.layers.1.mlp.gate_proj.weight"],
        truth["decoder.layers.1.mlp.linear_fc1.weight"][:48],
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["exit_layer_indices"]) == (100, [2, 4])


def test_a_vocabulary_size_must_fit_and_be_needed(megatron, origins, tmp_path):
    for size in (105, 0):
        with pytest.raises(
            SortedError,
            match=rf"--vocab-size: {size}, but the embedding of .* has 104 rows. Give 1\.\.104",
        ):
            convert.main(
                [
                    "import",
                    str(megatron / "legacy"),
                    str(tmp_path / "runs"),
                    "--vocab-size",
                    str(size),
                ]
            )
    with pytest.raises(
        SortedError,
        match=r"--vocab-size: 90, but .*single says that it has 100 tokens. Leave the option out",
    ):
        convert.main(
            ["import", str(origins / "single"), str(tmp_path / "runs"), "--vocab-size", "90"]
        )
    assert not list(tmp_path.iterdir())


def test_a_depth_that_is_no_exit_is_refused(origins, tmp_path):
    with pytest.raises(
        SortedError, match=r"--depth: 3 is no exit of this model.*Its exits are 1, 2, 4"
    ):
        extract_submodel.main([str(origins / "checkpoint"), str(tmp_path / "out"), "--depth", "3"])
    assert not list(tmp_path.iterdir())
