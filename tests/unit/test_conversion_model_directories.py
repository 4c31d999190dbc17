"""Convert, evaluate and decoding read the same of a directory or refuse it with one message."""

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_sorted.conversion.exporting import export_model
from megatron_sorted.conversion.importing import import_model
from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.conversion.origins import RequestedExits
from megatron_sorted.conversion.starting_settings import starting_settings
from megatron_sorted.conversion.writing import WriteOptions
from megatron_sorted.decoding.network import load_network
from megatron_sorted.errors import CheckpointError, SortedError
from megatron_sorted.exported.checkpoint_as_directory import as_hugging_face_directory
from megatron_sorted.exported.load import load_with_exits
from tests.support.commands import run_command
from tests.support.evaluated import write_tokenizer
from tests.support.model_directories import family_model, save_model, tokens

ROOT_COMMANDS = (
    ("tools/convert.py", "import", "m", "runs"),
    ("tools/extract_submodel.py", "m", "sub", "--depth", "2"),
    ("tools/generate.py", "m", "--prompt", "x"),
    ("tools/evaluate.py", "m", "--text", "text.txt", "--output", "ev"),
)
EMBEDDING, INDEX = "model.embed_tokens.weight", "model.safetensors.index.json"
STRATEGIES = {
    "convert": open_model,
    "evaluate": lambda path: load_with_exits(as_hugging_face_directory(path), torch.float32),
    "decode": lambda path: load_network(as_hugging_face_directory(path)),
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    save_model(directory / "one", "llama")
    save_model(directory / "many", "llama", num_shards=3)
    return directory


@pytest.fixture
def directory(intact, tmp_path):
    return Path(shutil.copytree(intact / "one", tmp_path / "m"))


def change(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refusals(directory: Path) -> set[str]:
    """Return the error messages of all readers; each must refuse the directory."""
    message_of = set()
    for strategy, read in STRATEGIES.items():
        with pytest.raises(SortedError) as caught:
            read(directory)
        assert type(caught.value) is CheckpointError and str(caught.value).isprintable(), strategy
        message_of.add(str(caught.value))
    return message_of


def embedding_of_all_readers(directory: Path) -> torch.Tensor:
    """Return the embedding that all readers and transformers read alike."""
    embeddings = [
        open_model(directory).source.read(EMBEDDING),
        load_with_exits(directory, torch.float32)[0].model.embed_tokens.weight,
        load_network(directory).embedding,
        AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        ).model.embed_tokens.weight,
    ]
    assert all(torch.equal(embeddings[0], other) for other in embeddings)
    return embeddings[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pad_token_id": [2]}, r"pad_token_id is \[2\] where a token's number or null is needed"),
        ({"pad_token_id": 100}, r"pad_token_id is 100 where one of 0\.\.99, -1 \(none\) or null"),
        ({"pad_token_id": -7}, "pad_token_id is -7"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5' where a finite number above 0"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": -1.0}, r"rms_norm_eps is -1\.0"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}},
            r"rope_parameters\.rope_theta is '1e4'",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": -2.0}},
            r"rope_scaling\.factor is -2\.0",
        ),
        ({"hidden_size": True}, "hidden_size is True where a number above 0"),
        ({"bos_token_id": True}, "bos_token_id is True"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no' where true or false"),
        ({"dtype": "org/repo"}, "dtype is 'org/repo'"),
        (
            {"num_hidden_layers": 10**9},
            r"num_hidden_layers is 1,000,000,000, .* hold 39 tensors "
            r".*layers\.4\.input_layernorm\.weight",
        ),
        (
            {"vocab_size": 10**9},
            r"has shape \[100, 32\], and config\.json makes it \[1000000000, 32\]",
        ),
        ({"head_dim": 1 << 30}, "q_proj.weight has shape"),
        ({"vocab_size": 1 << 70}, "vocab_size is"),
        (
            {"transformers_weights": "other.safetensors"},
            "transformers_weights is 'other.safetensors'; only",
        ),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config is .*; only weights that are not quantised",
        ),
        ({"\x1b[2J": 1, "model_type": "\x1b[2Jx"}, r"model_type '\\x1b\[2Jx' is not supported"),
        ({"model_type": []}, r"model_type \[\]"),
    ],
)
def test_all_readers_refuse_a_value_with_the_same_message(directory, values, message):
    change(directory, **values)
    (message_of,) = refusals(directory)
    assert re.search(message, message_of), message_of


@pytest.mark.parametrize("command", ROOT_COMMANDS)
def test_commands_print_one_line_of_error(directory, command):
    change(directory, pad_token_id=[2])
    write_tokenizer(directory)
    (directory.parent / "text.txt").write_text("hi\n")
    done = run_command(*command, cwd=directory.parent)
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    assert (
        "config.json: pad_token_id is [2] where a token's number or null is needed. Correct"
        in done.stderr.splitlines()[-1]
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "[" * 100_000, "nested more than 100 deep"),
        ("config.json", f'{{"vocab_size": {"9" * 5000}}}', "5,000 digits"),
        (INDEX, "[" * 100_000, "nested more than 100 deep"),
        (INDEX, "{", "not JSON"),
        (INDEX, '{"weight_map": {"a": "../x"}}', "lies outside"),
        (INDEX, '{"weight_map": {"a": "/etc/passwd"}}', "lies outside"),
        (INDEX, '{"weight_map": {"a": "x", "a": "y"}}', "a occurs twice"),
        (INDEX, '{"weight_map": {"a": "model.safetensors"}}', "is unknown to"),
    ],
)
def test_all_readers_refuse_a_damaged_file_beside_the_weights(directory, name, content, message):
    (directory / name).write_text(content)
    (message_of,) = refusals(directory)
    assert message in message_of and name in message_of


def header(text: str, size: int = 0) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + b"\0" * size


ENTRY = '"%s":{"dtype":"F32","shape":%s,"data_offsets":[%d,%d]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            header("{" + ENTRY % ("x", "[1]", 0, 4) + "," + ENTRY % ("x", "[1]", 4, 8) + "}", 8),
            "x occurs twice",
        ),
        (header("{" + ENTRY % ("x", "[2]", 0, 4) + "}", 4), "which should be 8 bytes from 0 on"),
        (
            header("{" + ENTRY % ("x", "[1]", 0, 4) + "," + ENTRY % ("y", "[1]", 0, 4) + "}", 4),
            "has bytes 0 to 4 by its header",
        ),
        (header("{" + ENTRY % ("x", "[1]", 4, 8) + "}", 8), "which should be 4 bytes from 0 on"),
        (
            header("{" + ENTRY % ("x", "[4611686018427387904,4]", 0, 4) + "}", 4),
            "which no tensor has",
        ),
        (header("{" + ENTRY % ("x", "[-1]", 0, 4) + "}", 4), "which no tensor has"),
        (header("[" * 100_000), "nested more than 100 deep"),
        (header("{" + ENTRY % ("\\u001b[2Jx", "[1]", 0, 8) + "}", 8), r"\x1b[2Jx"),
    ],
)
def test_all_readers_refuse_a_contradictory_header(directory, content, message):
    (directory / "model.safetensors").write_bytes(content)
    (message_of,) = refusals(directory)
    assert message in message_of


def test_a_sparse_file_with_a_huge_header_is_not_read(directory):
    size = 12 << 30
    with open(directory / "model.safetensors", "wb") as file:
        file.write((size - 8).to_bytes(8, "little"))
        file.truncate(size)
    (message_of,) = refusals(directory)
    assert "12,884,901,880 bytes, more than the format allows (100,000,000)" in message_of


HOSTILE = {
    "attn_implementation": "org/repo",
    "_attn_implementation": "org/repo",
    "_attn_implementation_internal": "org/repo",
    "experts_implementation": "org/repo",
    "auto_map": {"AutoConfig": "org/repo--x.Config", "AutoModelForCausalLM": "org/repo--x.Model"},
    "trust_remote_code": True,
    "text_config": {"model_type": "gpt2", "attn_implementation": "org/repo"},
    "_name_or_path": "org/repo",
    "base_model_tp_plan": {"layers.*": "x"},
    "custom_generate": "org/repo",
    "tokenizer_class": "org/repo--x",
    "torchscript": True,
    "pruned_heads": {"0": [1]},
    "_commit_hash": "x",
    "name_or_path": "org/repo",
    "use_kernels": True,
    "tie_encoder_decoder": True,
}


def test_no_key_runs_code_or_opens_a_connection(directory, monkeypatch):
    calls = []

    def recorded(self, address, *_):
        calls.append(address)
        raise OSError("no network here")

    expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(tokens()).logits
    change(directory, **HOSTILE)
    (directory / "generation_config.json").write_text(
        json.dumps(
            {
                "custom_generate": "org/repo",
                "cache_implementation": "static",
                "assistant_model": "org/repo",
                "trust_remote_code": True,
                "watermarking_config": {"x": 1},
                "compile_config": {"backend": "x"},
                "eos_token_id": 3,
            }
        )
    )
    (directory / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "org/repo", "peft_type": "LORA"})
    )
    monkeypatch.setattr(socket.socket, "connect", recorded)
    monkeypatch.setattr(socket, "getaddrinfo", recorded)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    model, _ = load_with_exits(directory, torch.float32)
    assert torch.equal(model(tokens()).logits, expected)
    assert model.config._attn_implementation == "sdpa" and model.generation_config.eos_token_id == 3
    assert [
        key for key, value in HOSTILE.items() if getattr(model.config, key, None) == value
    ] == []
    import_model(open_model(directory), directory.parent / "runs", RequestedExits((2,)))
    export_model(open_model(directory.parent / "runs"), directory.parent / "out")
    assert not {"attn_implementation", "auto_map", "text_config", "trust_remote_code"} & set(
        json.loads((directory.parent / "out/config.json").read_text())
    )
    assert calls == []


def test_a_whole_file_is_preferred_to_shards_with_a_note(intact, directory, capsys):
    for path in (intact / "many").glob("model*"):
        shutil.copy(path, directory)
    tensors = load_file(directory / "model.safetensors")
    save_file(
        {**tensors, EMBEDDING: tensors[EMBEDDING] + 1},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    assert torch.equal(embedding_of_all_readers(directory), tensors[EMBEDDING] + 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "holds model.safetensors and model.safetensors.index.json of 4 other files; "
        "model.safetensors is read" in line
    )


def test_a_whole_file_is_read_if_the_shards_are_missing(intact, directory):
    shutil.copy(intact / "many" / INDEX, directory)
    assert torch.equal(
        embedding_of_all_readers(directory), load_file(directory / "model.safetensors")[EMBEDDING]
    )


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "adapter_model.safetensors",
        "model-00001-of-00003.safetensors",
    ],
)
@pytest.mark.parametrize("kind", ["one", "many"])
def test_other_weight_files_are_not_read(kind, name, intact, tmp_path, capsys):
    directory = Path(shutil.copytree(intact / kind, tmp_path / "m"))
    (directory / name).write_bytes(b"damaged")
    model = open_model(directory)
    expected = AutoModelForCausalLM.from_pretrained(
        intact / kind, dtype=torch.float32
    ).model.embed_tokens.weight
    assert torch.equal(model.source.read(EMBEDDING), expected)
    assert torch.equal(
        load_with_exits(directory, torch.float32)[0].model.embed_tokens.weight, expected
    )
    assert (name in capsys.readouterr().err) == name.endswith(".safetensors")


@pytest.mark.parametrize("name", ["x" * 3000, "\\ud800", "none"])
def test_a_missing_shard_is_named(name, directory):
    (directory / "model.safetensors").unlink()
    (directory / INDEX).write_text(f'{{"weight_map": {{"a": "{name}"}}}}')
    (message_of,) = refusals(directory)
    assert "names 1 files and 1 are missing" in message_of


def test_more_layers_than_the_files_of_load_can_hold_are_refused(directory):
    change(directory, num_hidden_layers=10**9)
    with pytest.raises(
        CheckpointError,
        match=r"num_hidden_layers is 1,000,000,000 \(of 32 channels\), and its weight files have",
    ):
        starting_settings({"load": str(directory)})


def test_an_adapter_alone_is_no_model(directory):
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    (message_of,) = refusals(directory)
    assert "holds an adapter and no model" in message_of


def test_models_with_exits_have_an_index_and_all_readers_read_them(directory):
    import_model(
        open_model(directory),
        directory.parent / "runs",
        RequestedExits((2,), own_norms=True),
        WriteOptions(verify=False),
    )
    out = directory.parent / "out"
    export_model(open_model(directory.parent / "runs"), out)
    index = json.loads((out / INDEX).read_text())
    assert (
        set(index["weight_map"].values()) == {"model.safetensors"}
        and (out / "exits.safetensors").is_file()
    )
    assert index["weight_map"].keys() == load_file(out / "model.safetensors").keys()
    assert torch.equal(
        embedding_of_all_readers(out), load_file(directory / "model.safetensors")[EMBEDDING]
    )
    assert open_model(out).settings.exit_layer_nums == (2, 4)


@pytest.mark.parametrize("family", ["llama", "llama3", "llama_linear", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_loaded_here_computes_what_transformers_does(family, tied, tmp_path):
    save_model(tmp_path, family, tied)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours, _ = load_with_exits(tmp_path, torch.float32)
    assert torch.equal(ours(tokens()).logits, theirs(tokens()).logits)
    assert ours.config.to_dict() == {**theirs.config.to_dict(), "_name_or_path": str(tmp_path)} or (
        {k for k, v in ours.config.to_dict().items() if v != theirs.config.to_dict().get(k)}
        <= {"transformers_version", "_name_or_path"}
    )
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id
    assert type(ours) is type(family_model(family))
