"""Files for llama.cpp without llama.cpp: programs, limits, settings, the format, the judge."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.conversion.submodel import cut_submodel
from megatron_sorted.errors import CheckpointError, DataError, PlatformError, SettingsError
from megatron_sorted.llama_cpp.draft_settings import DraftSettings, draft_settings, serve_command
from megatron_sorted.llama_cpp.gguf_file import GgufFile
from megatron_sorted.llama_cpp.limits import context_length, cut_networks, notes_on
from megatron_sorted.llama_cpp.next_tokens import Agreement, judge
from megatron_sorted.llama_cpp.programs import VARIABLE, LlamaCpp, find_llama_cpp, run_program
from megatron_sorted.llama_cpp.source_directory import make_harmless, write_source, write_vocabulary
from megatron_sorted.llama_cpp.tensors import reordered
from megatron_sorted.llama_cpp.writing import bytes_needed, check_programs
from tests.support.evaluated import write_model
from tests.support.stand_in_llama_cpp import write_llama_cpp


@pytest.fixture(scope="module")
def nested(tmp_path_factory) -> Path:
    """Return a nested model of three layers with exits 1 and 3, and a tokenizer."""
    return write_model(tmp_path_factory.mktemp("models") / "nested", exit_layer_indices=[1, 3])


def change_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_programs_come_from_option_variable_and_path(tmp_path, monkeypatch):
    """A named folder counts alone; without one, PATH and the cache of the lab's build."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv(VARIABLE, raising=False)
    assert find_llama_cpp() == LlamaCpp()
    one = write_llama_cpp(tmp_path / "one")
    expected = LlamaCpp(one / "convert_hf_to_gguf.py", one / "build" / "bin" / "llama-quantize")
    assert find_llama_cpp(one) == expected
    monkeypatch.setenv(VARIABLE, str(one))
    assert find_llama_cpp() == expected
    with pytest.raises(PlatformError, match=r"--llama-cpp: .*holds neither convert_hf_to_gguf.py"):
        find_llama_cpp(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(PlatformError, match=f"{VARIABLE}: .* holds neither"):
        find_llama_cpp()
    monkeypatch.delenv(VARIABLE)
    build = tmp_path / "cache" / "llama_cpp_contest"
    sources = build / "llama_cpp_python-0.1" / "vendor" / "llama.cpp"
    shutil.copytree(one, sources)
    (build / "build_without_amx").mkdir()
    (sources / "build" / "bin").rename(build / "build_without_amx" / "bin")
    programs = find_llama_cpp()
    assert programs.converter == sources / "convert_hf_to_gguf.py"
    assert programs.quantiser == build / "build_without_amx" / "bin" / "llama-quantize"
    monkeypatch.setenv("PATH", str(one / "build" / "bin"))
    assert find_llama_cpp().quantiser == expected.quantiser


def test_a_missing_program_is_named():
    """The quantiser is needed for types that the converter does not write."""
    converter = LlamaCpp(Path("convert_hf_to_gguf.py"))
    check_programs(converter, ["f32", "q8_0"])
    with pytest.raises(PlatformError, match="llama-quantize: not found"):
        check_programs(converter, ["f32", "q4_k_m"])
    with pytest.raises(PlatformError, match=r"convert_hf_to_gguf.py: not found .* --llama-cpp"):
        check_programs(LlamaCpp(), ["f32"])


def test_a_failed_program_shows_its_last_lines():
    """Both streams are shown, without their beginning."""
    program = "import sys; print('\\n'.join(map(str, range(100)))); sys.exit('no luck')"
    with pytest.raises(PlatformError) as raised:
        run_program([sys.executable, "-c", program], remedy="Try again.")
    assert "ended with status 1" in str(raised.value) and "no luck\nTry again." in str(raised.value)
    assert "\n  99\n" in str(raised.value) and "\n  80\n" not in str(raised.value)
    with pytest.raises(PlatformError, match="No such file or directory"):
        run_program(["/absent/llama-quantize"])


@pytest.mark.parametrize(
    ("best", "strategies", "expected"),
    [
        ("full", {}, (1, 4, 0.0)),
        ("full", {"self_speculative": {"depth": 2, "num_draft_tokens": 3}}, (2, 3, 0.0)),
        (
            "sorted_speculative",
            {
                "self_speculative": {"depth": 2, "num_draft_tokens": 3},
                "sorted_speculative": {
                    "depths": [1, 2], "thresholds": [0.4, 0.1], "num_draft_tokens": 7,
                    "measure": "probability",
                },
            },
            (1, 7, 0.4),
        ),
        (
            "full",
            {"sorted_speculative": {"depths": [2], "thresholds": [0.4], "measure": "margin"}},
            (2, 8, 0.0),
        ),
        ("tree", {"tree": {"depths": [2], "num_levels": 6}}, (2, 6, 0.0)),
        ("full", {"self_speculative": {"depth": 8}}, (1, 4, 0.0)),
        ("full", {"early_exit": {"depths": [1], "thresholds": [0.5]}}, (1, 4, 0.0)),
    ],
)  # fmt: skip
def test_settings_of_drafts(best, strategies, expected, tmp_path):
    """They come from decoding.json, from a strategy that drafts with one of the exits."""
    if strategies:
        tuned = {"format": 1, "best": best, "strategies": {"full": {}, **strategies}}
        (tmp_path / "decoding.json").write_text(json.dumps(tuned))
    settings = draft_settings(tmp_path, (1, 2, 4))
    assert (settings.depth, settings.num_draft_tokens, settings.least_confidence) == expected
    assert draft_settings(tmp_path, (4,)).depth is None
    (tmp_path / "decoding.json").write_text("{")
    with pytest.raises(DataError, match="tune again"):
        draft_settings(tmp_path, (1, 2, 4))


def test_command_that_serves():
    """The draft comes with its settings; further end tokens take llama.cpp's other places."""
    settings = DraftSettings(2, 5, 0.25)
    line = serve_command(Path("m 12.gguf"), Path("m 2.gguf"), settings, (7, 8, 9, 10))
    assert line == (
        "llama-server --model 'm 12.gguf' --override-kv tokenizer.ggml.eot_token_id=int:8 "
        "--override-kv tokenizer.ggml.eom_token_id=int:9 --model-draft 'm 2.gguf' "
        "--spec-type draft-simple --spec-draft-n-max 5 --spec-draft-p-min 0.25"
    )
    assert serve_command(Path("m"), None, settings, (7,)) == "llama-server --model m"


def test_what_llama_cpp_cannot_do(tmp_path, nested):
    """No tokenizer, dropped rope scaling, a depth that is no exit: one sentence each."""
    with pytest.raises(SettingsError, match=r"2 is no exit .* exits are 1, 3"):
        cut_networks(open_model(nested), [2])
    assert set(cut_networks(open_model(nested), [1, 3])) == {1, 3}
    bare = shutil.copytree(nested, tmp_path / "bare")
    (bare / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match="it has no tokenizer, and a GGUF file holds one"):
        cut_networks(open_model(bare), [3])
    scaling = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    }  # fmt: skip
    for family, accepted in (("llama", True), ("qwen2", False)):
        path = write_model(tmp_path / family, family, rope_parameters=scaling)
        if accepted:
            cut_networks(open_model(path), [3])
        else:
            with pytest.raises(CheckpointError, match=r"rope scaling llama3 .* type qwen2"):
                cut_networks(open_model(path), [3])
    yarn = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    path = write_model(tmp_path / "yarn", "llama", rope_parameters=yarn)
    with pytest.raises(CheckpointError, match=r"rope scaling yarn, and"):
        cut_networks(open_model(path), [3])


def test_windows_limit_the_context(tmp_path):
    """llama.cpp attends to all tokens, so a longer text than the window would be wrong."""
    path = write_model(tmp_path / "mistral", "mistral", sliding_window=20)
    model = open_model(path)
    assert context_length(model.settings) == 20
    [line] = notes_on(model.settings, ["f32"])
    assert "limited to the sliding window, 20 tokens" in line
    write_source(cut_submodel(model, 3), tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    assert config["max_position_embeddings"] == 20


def test_notes_and_room(nested):
    """Hidden sizes that types cannot have are noted; room is what files and copies need."""
    model = open_model(nested)
    [line] = notes_on(model.settings, ["f32", "q4_k_m", "q8_0"])
    assert line.startswith("hidden size 32 is no multiple of 256: files of q4_k_m hold")
    assert notes_on(model.settings, ["f32", "bf16"]) == []
    networks = cut_networks(model, [1, 3])
    sizes = {
        depth: sum(pair.numel() for pair in _tensors(cut_submodel(model, depth)))
        for depth in (1, 3)
    }
    expected = 4 * sizes[1] + 4 * sizes[3] + 8 * sizes[3]
    assert bytes_needed(networks, 300, ["f32"]) == pytest.approx(expected, rel=0.02)


def _tensors(network):
    for origin in network.origins.values():
        yield from network.model.read_theirs(origin)


def test_nothing_of_the_directory_can_run(tmp_path, nested):
    """The converter trusts code, so it gets none, and no key that names another architecture."""
    evil = shutil.copytree(nested, tmp_path / "evil")
    (evil / "evil.py").write_text("raise SystemExit")
    (evil / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}, "bos_token": "<s>"})
    )
    change_config(evil, draft_vocab_size=300, transformer_layer_config={"hidden_size": 1})
    write_source(cut_submodel(open_model(evil), 1), tmp_path / "source")
    names = {path.name for path in (tmp_path / "source").iterdir()}
    assert not any(name.endswith(".py") for name in names) and "exits.safetensors" not in names
    assert "auto_map" not in (tmp_path / "source" / "tokenizer_config.json").read_text()
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    assert not {"draft_vocab_size", "transformer_layer_config"} & set(config)
    assert (config["num_hidden_layers"], config["bos_token_id"], config["eos_token_id"]) == (
        1,
        1,
        2,
    )


def test_what_an_export_would_leave_is_removed(tmp_path, nested):
    """Modules and an auto_map that names one are removed, whoever wrote them."""
    network, source = cut_submodel(open_model(nested), 1), tmp_path / "source"
    write_vocabulary(network, source)
    config = json.loads((source / "config.json").read_text())
    (source / "evil.py").write_text("raise SystemExit")
    path = source / "tokenizer_config.json"
    evil = {"AutoTokenizer": ["someone/model--evil.Tokenizer", None]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": evil}))
    make_harmless(network, source, config)
    assert "auto_map" not in json.loads(path.read_text())
    assert not (source / "evil.py").exists() and (source / "tokenizer.model").exists()


def test_only_our_own_module_stays(tmp_path):
    """Qwen2's class is chosen whatever a directory names, unless a module of ours is named."""
    qwen = write_model(tmp_path / "qwen2", "qwen2")
    network = cut_submodel(open_model(qwen), 3)
    write_source(network, tmp_path / "source")
    text = (tmp_path / "source" / "tokenizer_as_written.py").read_text()
    (qwen / "tokenizer_as_written.py").write_text("raise SystemExit")
    write_source(cut_submodel(open_model(qwen), 3), tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer_as_written.py").read_text() == text
    assert "raise" not in text


def test_channels_that_rotate_together_become_neighbours():
    """Rotating neighbours after the change of order is rotating halves before it."""
    generator = torch.Generator().manual_seed(0)
    heads, size, hidden = 3, 8, 5
    weight = torch.randn(heads * size, hidden, generator=generator)
    state, angles = torch.randn(hidden, generator=generator), torch.rand(size // 2)

    def halves(values):
        left, right = values.view(heads, 2, size // 2).unbind(1)
        turned = (
            left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()
        )  # fmt: skip
        return torch.stack(turned, 1).reshape(-1)

    def neighbours(values):
        even, odd = values.view(heads, size // 2, 2).unbind(2)
        turned = (
            even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()
        )  # fmt: skip
        return torch.stack(turned, 2).reshape(-1)

    expected = halves(weight @ state).view(heads, 2, size // 2).transpose(1, 2).reshape(-1)
    assert torch.allclose(neighbours(reordered(weight, size) @ state), expected, atol=1e-6)


@pytest.fixture(scope="module")
def written(tmp_path_factory, nested) -> Path:
    """Return a file that the stand-in for the converter wrote."""
    folder = tmp_path_factory.mktemp("llama")
    write_llama_cpp(folder / "llama.cpp")
    source = folder / "source"
    write_source(cut_submodel(open_model(nested), 3), source)
    target = folder / "file.gguf"
    converter = folder / "llama.cpp" / "convert_hf_to_gguf.py"
    subprocess.run(
        [sys.executable, converter, source, "--outfile", target], check=True, timeout=120
    )
    return target


def test_a_file_is_read(written):
    """Metadata, shapes in torch's order, and numbers."""
    file = GgufFile(written)
    assert file.metadata["general.architecture"] == "llama"
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 300
    assert file.tensors["blk.0.ffn_up.weight"].shape == (48, 32)
    assert file.read("token_embd.weight").shape == (300, 32)
    assert file.kinds() == {"F32": 22}
    assert file.num_bytes == 4 * sum(torch.Size(one.shape).numel() for one in file.tensors.values())


def test_damaged_files_are_refused(written, tmp_path):
    """A file that ends early, and sizes that no file has, are refused before they are believed."""
    data, path = written.read_bytes(), tmp_path / "damaged.gguf"
    for length in [*range(0, 4000, 97), len(data) - 40]:
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match="Convert again"):
            GgufFile(path)
    for begin, layout, value in ((4, "<I", 9), (8, "<Q", 1 << 40), (16, "<Q", 1 << 60),
                                 (24, "<Q", 1 << 62)):  # fmt: skip
        changed = bytearray(data)
        struct.pack_into(layout, changed, begin, value)
        path.write_bytes(changed)
        with pytest.raises(DataError):
            GgufFile(path)
    path.write_bytes(b"PK\x03\x04" + data)
    with pytest.raises(DataError, match="does not begin with GGUF"):
        GgufFile(path)


def test_tokens_are_judged_at_their_positions():
    """A near tie is listed with its margin and is no problem; another difference is one."""
    logits = torch.full((6, 8), -10.0)
    prompt, written = [1, 2, 3], [4, 5, 6, 7]
    for place, token in enumerate(written, len(prompt)):
        logits[place - 1, token] = 10.0
    agreement = Agreement(2, "f32")
    judge(agreement, logits, prompt, written)
    assert (agreement.num_same, agreement.num_tokens, agreement.differences) == (4, 4, [])
    logits[3, 0] = 10.001  # instead of 5, by a margin of an error of float32
    logits[4, 1] = 10.5
    agreement = Agreement(2, "f32")
    judge(agreement, logits, prompt, written)
    tie, other = agreement.differences
    assert (tie.position, tie.written, tie.best) == (4, 5, 0) and tie.is_near_tie()
    assert (other.position, other.written, other.best) == (5, 6, 1) and not other.is_near_tie()
    assert agreement.num_same == 2
    [problem] = agreement.problems()
    assert "token 6 at position 5, where 1 is more likely by a logit difference of 0.5" in problem
    assert "2 of 4, 1 near ties (margins 0.001), 1 others (margins 0.5)" in agreement.line()
    assert len(agreement.problems(1e-6)) == 2
