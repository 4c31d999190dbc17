"""A faulty directory ends in one line that names it, whatever error transformers raises."""

import json
import shutil

import pytest
import torch

from megatron_sorted.decoding.open_model import open_text_generator
from megatron_sorted.errors import CheckpointError, DataError
from megatron_sorted.exported.load import load_with_exits
from megatron_sorted.exported.tokenizer import open_tokenizer
from tests.support.evaluated import write_model


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "m", num_layers=2)


@pytest.fixture
def directory(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"exit_layer_indices": [99]},
            r"config\.json: exit_layer_indices \[99\]: .* 99 is not a layer",
        ),
        ({"exit_layer_indices": [0, 2]}, r"exit_layer_indices \[0, 2\]"),
        ({"exit_layer_indices": "ab"}, "exit_layer_indices 'ab': not a list"),
        ({"exit_layer_indices": [1.5]}, "not a list of depths"),
        ({"exit_layer_indices": 2}, "exit_layer_indices 2"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2' where a number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (
            {"num_attention_heads": 0},
            r"config\.json: num_attention_heads is 0 where a number above 0 is needed\. Correct",
        ),
        (
            {"max_position_embeddings": "many"},
            "max_position_embeddings is 'many' where a number above 0",
        ),
        ({"eos_token_id": [1, "a"]}, "eos_token_id is .* where a token's number, a list of them"),
        ({"rope_scaling": "abc"}, "rope_scaling is 'abc' where an object or null"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantization_config is .*; only weights that are not quantised",
        ),
    ],
)
def test_a_contradictory_config_is_refused(directory, change, message):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_with_exits(directory, torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": []}', "no weight_map"),
        ("{", "not JSON"),
        (
            '{"weight_map": {"lm_head.weight": "../../etc/passwd"}}',
            "'../../etc/passwd', which lies outside the directory",
        ),
    ],
)
def test_an_index_of_missing_files_is_refused(directory, index, message):
    (directory / "model.safetensors").rename(directory / "model-1.safetensors")
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=rf"index\.json: .*{message}"):
        load_with_exits(directory, torch.float32)


@pytest.mark.parametrize(
    "written",
    [
        '{"eos_token": 5}',
        '{"added_tokens_decoder": [1]}',
        '{"added_tokens_decoder": {"x": {"content": "a"}}}',
    ],
)
def test_vocabulary_files_beside_a_sentencepiece_file(directory, written):
    (directory / "tokenizer_config.json").write_text(written)
    with pytest.raises(
        DataError,
        match=r"tokenizer_config\.json: .* not (a token|an object|an id)\. .* --tokenizer",
    ):
        open_tokenizer(directory)


@pytest.mark.parametrize("ends", ["x", [1, None]])
def test_invalid_end_tokens_are_refused(directory, ends):
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(
        DataError,
        match=r"generation_config\.json: eos_token_id .* is not one of the model's 0\.\.299\. "
        "Correct",
    ):
        open_text_generator(directory)
