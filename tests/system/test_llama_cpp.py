"""``megatron-sorted convert gguf``, with stand-ins for llama.cpp's programs and with these."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from lab import bench_llama_cpp
from megatron_sorted.commands import convert
from megatron_sorted.errors import CheckpointError, PlatformError, SettingsError
from megatron_sorted.llama_cpp.gguf_file import GgufFile
from megatron_sorted.llama_cpp.programs import VARIABLE, find_llama_cpp
from tests.support.evaluated import VOCAB_SIZE, write_model, write_tokenizer
from tests.support.exit_parts import save_nested
from tests.support.hugging_face import DEFAULTS
from tests.support.stand_in_llama_cpp import seen_files, write_llama_cpp
from tests.support.stand_in_llama_server import write_program


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Return nested models of every family."""
    folder = tmp_path_factory.mktemp("models")
    return {
        family: write_model(folder / family, family, tied=tied, exit_layer_indices=[1, 3])
        for family, tied in (("llama", True), ("mistral", False), ("qwen2", True), ("qwen3", False))
    }


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory) -> Path:
    """Return a folder of stand-ins without a server."""
    return write_llama_cpp(tmp_path_factory.mktemp("programs") / "llama.cpp")


def run(model: Path, target: Path, *options) -> None:
    """Run the command in this process."""
    convert.main(["gguf", str(model), str(target), *map(str, options)])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_files_of_every_family(family, models, llama_cpp, tmp_path, capsys):
    """Every exit is written, every tensor compared; the command names the model that drafts."""
    target = tmp_path / "out"
    tuned = {"format": 1, "strategies": {"self_speculative": {"depth": 1, "num_draft_tokens": 3}}}
    model = shutil.copytree(models[family], tmp_path / family)
    (model / "decoding.json").write_text(json.dumps(tuned))
    run(model, target, "--type", "f32", "q4_k_m", "--llama-cpp", llama_cpp)
    names = {f"{family}-{depth}-{kind}.gguf" for depth in (1, 3) for kind in ("f32", "q4_k_m")}
    assert {path.name for path in target.iterdir()} == names | {"llama-server.txt"}
    file = GgufFile(target / f"{family}-1-f32.gguf")
    assert file.metadata[f"{file.metadata['general.architecture']}.block_count"] == 1
    printed = capsys.readouterr().out
    assert "11 of 11 tensors equal" in printed or "12 of 12" in printed or "14 of 14" in printed
    assert "next tokens were not compared, since llama-server was not found" in printed
    command = (target / "llama-server.txt").read_text()
    assert f"--model {target}/{family}-3-f32.gguf --model-draft {target}/{family}-1-f32" in command
    assert "--spec-draft-n-max 3" in command and command.strip() in printed
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
    assert not any(name.endswith(".py") for name in seen_files(llama_cpp) - {
        "tokenizer_as_written.py"})  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("vocabulary", PlatformError, r"BPE pre-tokenizer was not recognized\n.* cannot take this"),
        ("fails", PlatformError, r"convert_hf_to_gguf.py ended with status 1(.|\n)*out of luck"),
        ("order", CheckpointError, r"blk.0.attn_q.weight has other numbers; blk.0.attn_k"),
        ("value", CheckpointError, "output_norm.weight has other numbers"),
        ("missing", CheckpointError, "blk.0.ffn_up.weight is missing"),
        ("end", CheckpointError, r"tokenizer.ggml.eos_token_id is 9, not 2"),
    ],
)
def test_a_converter_that_does_wrong(fault, error, message, models, tmp_path):
    """Nothing is left, and what was there before is unchanged."""
    programs = write_llama_cpp(tmp_path / "llama.cpp", fault)
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(error, match=message):
        run(models["llama"], target, "--type", "f32", "--llama-cpp", programs, "--overwrite")
    assert [path.name for path in target.iterdir()] == ["mine.txt"]
    assert {path.name for path in tmp_path.iterdir()} == {"llama.cpp", "out"}
    if fault == "vocabulary":  # before any weight was copied
        assert not any(name.endswith(".safetensors") for name in seen_files(programs))


def test_nothing_is_overwritten(models, llama_cpp, tmp_path):
    """An existing folder, the model itself, and a full list of refusals come before work."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        run(models["llama"], target, "--llama-cpp", llama_cpp)
    run(models["llama"], target, "--llama-cpp", llama_cpp, "--overwrite", "--type", "f32")
    assert not (target / "mine.txt").exists()
    with pytest.raises(CheckpointError, match="the model to convert"):
        run(models["llama"], models["llama"], "--llama-cpp", llama_cpp, "--overwrite")
    with pytest.raises(SettingsError, match=r"2 is no exit of this model"):
        run(models["llama"], tmp_path / "new", "--llama-cpp", llama_cpp, "--depth", 2)
    assert not (tmp_path / "new").exists()


def test_without_llama_cpp_the_commands_are_printed(models, tmp_path, monkeypatch, capsys):
    """The exact commands, and an error that says that nothing was converted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(PlatformError, match=r"convert_hf_to_gguf.py and llama-quantize: not found"):
        run(models["llama"], tmp_path / "out", "--type", "q4_k_m", "--depth", 1, 3)
    out, lines = tmp_path / "out", capsys.readouterr().out.split("\n")
    model = models["llama"]
    for line in (
        f"megatron-sorted extract {model} {out}/hf-1 --depth 1",
        f"python LLAMA_CPP/convert_hf_to_gguf.py {out}/hf-3 --outfile {out}/llama-3-f32.gguf "
        "--outtype f32",
        f"LLAMA_CPP/build/bin/llama-quantize {out}/llama-1-f32.gguf {out}/llama-1-q4_k_m.gguf "
        "Q4_K_M",
        f"llama-server --model {out}/llama-3-q4_k_m.gguf --model-draft {out}/llama-1-q4_k_m.gguf "
        "--spec-type draft-simple --spec-draft-n-max 4 --spec-draft-p-min 0",
    ):
        assert line in lines
    assert not out.exists()


def test_a_server_that_reads_other_tokens(models, tmp_path):
    """A server whose vocabulary is another one ends the conversion, unless it is not asked for."""
    programs = write_llama_cpp(tmp_path / "llama.cpp")
    write_program(programs / "build" / "bin" / "llama-server")
    target = tmp_path / "out"
    options = ("--type", "f32", "--depth", 3, "--llama-cpp", programs)
    with pytest.raises(CheckpointError, match=r"becomes 3 tokens instead of .* --no-verify"):
        run(models["llama"], target, *options)
    assert not target.exists()
    run(models["llama"], target, *options, "--no-verify")
    assert (target / "llama-3-f32.gguf").is_file()


def real() -> Path:
    """Return llama.cpp's server; skip the test where it is missing."""
    programs = find_llama_cpp()
    if None in (programs.converter, programs.quantiser, programs.server):
        pytest.skip("llama.cpp is not installed: python -m lab.build_llama_cpp")
    return programs.server


@pytest.mark.faults
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_real_llama_cpp(family, models, tmp_path, capsys):
    """llama.cpp's own programs: every exit's next tokens in float32 are transformers'."""
    real()
    target = tmp_path / "out"
    run(models[family], target, "--type", "f32", "bf16", "q8_0", "--threads", 1)
    printed = capsys.readouterr().out
    assert "tensors and next tokens verified" in printed
    for depth in (1, 3):
        [line] = [one for one in printed.split("\n") if one.split()[:2] == [f"@{depth}", "f32"]]
        same, total = int(line.split()[2]), int(line.split()[4].rstrip(","))
        assert total >= 40 and total - same <= 1 and "others" not in line


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["block", "mlp"])
def test_real_llama_cpp_with_parts_of_exits(kind, tmp_path, monkeypatch, capsys):
    """Exits with norms, heads, blocks or MLPs of their own run as ordinary models there."""
    real()
    monkeypatch.setitem(DEFAULTS, "vocab_size", VOCAB_SIZE)
    save_nested(tmp_path / kind, "llama", kind, norms=True, heads=True)
    write_tokenizer(tmp_path / kind)
    run(tmp_path / kind, tmp_path / "out", "--type", "f32", "--threads", 1)
    printed = capsys.readouterr().out
    assert "tensors and next tokens verified" in printed and "others" not in printed


@pytest.mark.faults
def test_real_measurement(models, tmp_path, monkeypatch):
    """lab.bench_llama_cpp writes its page: drafts are accepted, and texts are those without."""
    real()
    files, questions = tmp_path / "files", tmp_path / "questions.jsonl"
    run(models["llama"], files, "--type", "f32", "bf16", "--threads", 1)
    lines = [
        json.dumps({"question_id": n, "category": "qa", "turns": [f"Who is {n}?"]})
        for n in range(4)
    ]
    questions.write_text("\n".join(lines))
    arguments = [
        "bench_llama_cpp", models["llama"], "--files", files, "--questions", questions,
        "--kinds", "f32", "bf16", "--tokens", 8, "--rounds", 2, "--threads", 1, "--per-group", 2,
        "--output", tmp_path,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(one) for one in arguments])
    bench_llama_cpp.main()
    rows = json.loads((tmp_path / "llama_cpp.json").read_text())["rows"]
    assert len(rows) == 8 and all(row["tokens"] == 16 for row in rows)
    drafts = [row for row in rows if row["strategy"] == "draft"]
    assert all(row["drafted"] >= row["accepted"] for row in drafts)
    assert all(row["same"] == 2 for row in rows if row["kind"] == "f32")
    assert "first 1 layers, MB" in (tmp_path / "llama_cpp.md").read_text()
