import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sorted.conversion.exporting import export_model
from megatron_sorted.conversion.importing import import_model
from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.conversion.origins import RequestedExits
from megatron_sorted.conversion.verifying.comparison import compare
from megatron_sorted.conversion.writing import WriteOptions
from megatron_sorted.errors import CheckpointError, SettingsError
from megatron_sorted.training.run.resume import tokenizer_hashes
from tests.support.hugging_face import exit_logits
from tests.support.layouts import thinned
from tests.support.model_directories import FAMILIES, save_model, tokens


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in sorted(directory.glob("model*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        for name in one
    )


@pytest.mark.parametrize("dtype", thinned([torch.float32, torch.bfloat16], torch.bfloat16))
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bitwise(family, tied, num_shards, dtype, tmp_path):
    save_model(tmp_path / "origin", family, tied, num_shards, dtype)
    assert len(list((tmp_path / "origin").glob("*.safetensors"))) >= num_shards
    model = open_model(tmp_path / "origin")
    inward = import_model(model, tmp_path / "checkpoint", RequestedExits((1, 3))).comparison
    shard_bytes = 10**9 if num_shards == 1 else 20_000
    outward = export_model(
        open_model(tmp_path / "checkpoint"), tmp_path / "back", shard_bytes=shard_bytes
    ).comparison
    assert same(weights(tmp_path / "origin"), weights(tmp_path / "back"))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) >= num_shards
    for comparison in (inward, outward):
        assert not comparison.problems and [row.depth for row in comparison.exits] == [1, 3, 4]
        for row in comparison.exits:
            assert row.largest_difference <= 1e-5 * max(1.0, row.largest_logit)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_the_comparison_are_those_of_transformers_at_every_depth(family, tmp_path):
    from megatron_sorted.conversion.verifying.nested_logits import nested_exits
    from megatron_sorted.conversion.verifying.transformers_states import transformers_exits

    reference = exit_logits(save_model(tmp_path / "origin", family), tokens())
    model = open_model(tmp_path / "origin")
    import_model(
        model, tmp_path / "checkpoint", RequestedExits((1, 2, 3)), WriteOptions(verify=False)
    )
    checkpoint = open_model(tmp_path / "checkpoint")
    pairs = {pair.ours: pair for pair in checkpoint.pairs}
    ours = nested_exits(
        checkpoint.settings, lambda name: checkpoint.read_ours(pairs[name]), tokens(), (1, 2, 3, 4)
    )
    theirs = transformers_exits(model, tokens(), (1, 2, 3, 4))
    for depth, logits in reference.items():
        scale = float(logits.abs().max())
        assert scale > 1, "logits so small would agree whatever the network"
        assert float((ours[depth].logits() - logits).abs().max()) <= 1e-5 * scale, depth
        assert float((theirs[depth].logits() - logits).abs().max()) <= 1e-5 * scale, depth


@pytest.fixture
def checkpoint(tmp_path):
    save_model(tmp_path / "origin", "qwen3")
    import_model(open_model(tmp_path / "origin"), tmp_path / "checkpoint", RequestedExits((2,)))
    return tmp_path / "checkpoint"


def test_a_conversion_that_fails_verification_is_not_written(checkpoint, tmp_path, monkeypatch):
    # a mapping that swaps gate and up is its own inverse: only the comparison with the origin can
    # find it
    from megatron_sorted.conversion.tensors import operations

    monkeypatch.setattr(operations.Stack, "split", lambda self, tensor: list(tensor.chunk(2))[::-1])
    with pytest.raises(
        CheckpointError,
        match=r"the conversion does not match its origin, so nothing was "
        r"written.*linear_fc1.weight",
    ):
        export_model(open_model(checkpoint), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_an_error_in_both_directions_shows_in_the_logits(tmp_path, monkeypatch):
    from megatron_sorted.conversion.tensors import operations

    def join(self, parts, shape):
        return torch.cat(list(parts)[::-1])

    monkeypatch.setattr(operations.Stack, "join", join)
    monkeypatch.setattr(operations.Stack, "split", lambda self, tensor: list(tensor.chunk(2))[::-1])
    save_model(tmp_path / "origin", "llama")
    with pytest.raises(CheckpointError, match=r"exit @1: logits differ by up to"):
        import_model(open_model(tmp_path / "origin"), tmp_path / "checkpoint", RequestedExits((1,)))
    assert not (tmp_path / "checkpoint").exists()


def test_an_existing_destination_is_kept_without_overwrite(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"exists and is not empty.*--overwrite"):
        export_model(open_model(checkpoint), tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
    export_model(open_model(checkpoint), tmp_path / "out", WriteOptions(overwrite=True))
    assert (
        not (tmp_path / "out" / "mine.txt").exists() and (tmp_path / "out" / "config.json").exists()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "origin", "out"]


def test_an_interrupted_conversion_leaves_nothing(checkpoint, tmp_path):
    def watch(_title, _num_bytes):
        def count(_done):
            raise KeyboardInterrupt

        return count

    with pytest.raises(KeyboardInterrupt):
        export_model(open_model(checkpoint), tmp_path / "out", WriteOptions(watch=watch))
    with pytest.raises(KeyboardInterrupt):
        import_model(
            open_model(tmp_path / "origin"),
            tmp_path / "again",
            RequestedExits(),
            WriteOptions(watch=watch),
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "origin"]


def test_a_full_disk_is_detected_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(CheckpointError, match=r"MB are needed and 0 MB are free"):
        export_model(open_model(checkpoint), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_new_norms_and_heads_are_copies_of_the_last(tmp_path):
    save_model(tmp_path / "origin", "qwen2", tied=True)
    import_model(
        open_model(tmp_path / "origin"),
        tmp_path / "checkpoint",
        RequestedExits((1, 3), own_norms=True, own_heads=True),
    )
    comparison = export_model(open_model(tmp_path / "checkpoint"), tmp_path / "out").comparison
    assert [row.depth for row in comparison.exits] == [1, 3, 4]
    assert same(weights(tmp_path / "origin"), weights(tmp_path / "out"))
    origin, own = weights(tmp_path / "origin"), load_file(tmp_path / "out" / "exits.safetensors")
    assert sorted(own) == sorted(
        f"exits.{depth}.{part}.weight" for depth in (1, 3) for part in ("norm", "lm_head")
    )
    for depth in (1, 3):
        assert torch.equal(own[f"exits.{depth}.norm.weight"], origin["model.norm.weight"])
        assert torch.equal(
            own[f"exits.{depth}.lm_head.weight"], origin["model.embed_tokens.weight"]
        )
    # and back, with numbers that differ from the last exit's
    save_file(
        {name: tensor + 0.25 for name, tensor in own.items()},
        tmp_path / "out" / "exits.safetensors",
    )
    import_model(open_model(tmp_path / "out"), tmp_path / "second", RequestedExits())
    export_model(open_model(tmp_path / "second"), tmp_path / "third")
    assert same(
        load_file(tmp_path / "third" / "exits.safetensors"),
        {name: tensor + 0.25 for name, tensor in own.items()},
    )


def test_requested_exits_must_be_layers(tmp_path):
    save_model(tmp_path / "origin", "llama")
    with pytest.raises(SettingsError, match="9 is not a layer of this model"):
        import_model(open_model(tmp_path / "origin"), tmp_path / "checkpoint", RequestedExits((9,)))
    assert not (tmp_path / "checkpoint").exists()


def test_numbers_may_be_written_in_another_data_type(checkpoint, tmp_path):
    comparison = export_model(
        open_model(checkpoint), tmp_path / "half", dtype="bfloat16"
    ).comparison
    assert not comparison.problems
    origin, half = weights(tmp_path / "origin"), weights(tmp_path / "half")
    assert same({name: tensor.bfloat16() for name, tensor in origin.items()}, half)
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_small_files_are_copied_in_both_directions(tmp_path):
    save_model(tmp_path / "origin", "llama")
    small = {
        "generation_config.json": '{"temperature": 0.6, "eos_token_id": [2, 7]}',
        "chat_template.jinja": "{{ messages }}",
        "special_tokens_map.json": "{}",
        "tokenizer_config.json": '{"model_max_length": 128}',
    }
    for name, text in small.items():
        (tmp_path / "origin" / name).write_text(text)
    import_model(open_model(tmp_path / "origin"), tmp_path / "checkpoint", RequestedExits())
    export_model(open_model(tmp_path / "checkpoint"), tmp_path / "back")
    for name, text in small.items():
        assert (tmp_path / "back" / name).read_text() == text, name


def test_a_tied_model_whose_stored_head_differs_is_refused(tmp_path):
    save_model(tmp_path / "origin", "llama", tie_word_embeddings=True)
    with pytest.raises(
        CheckpointError, match=r"says tie_word_embeddings, but lm_head.weight differs"
    ):
        open_model(tmp_path / "origin")


def test_a_difference_in_one_number_is_detected(tmp_path):
    save_model(tmp_path / "origin", "mistral")
    shutil.copytree(tmp_path / "origin", tmp_path / "other")
    changed = weights(tmp_path / "origin")
    changed["model.layers.2.mlp.down_proj.weight"][3, 4] += 0.5
    save_file(changed, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    comparison = compare(open_model(tmp_path / "origin"), open_model(tmp_path / "other"))
    (first, *rest) = comparison.problems
    assert first == "decoder.layers.2.mlp.linear_fc2.weight: 1 of 1536 numbers differ, by up to 0.5"
    assert all(sentence.startswith(("exit @3", "exit @4")) for sentence in rest) and rest


@pytest.mark.parametrize("content", ["nothing", "notes.txt"])
def test_other_directories_are_refused(content, tmp_path):
    if content != "nothing":
        (tmp_path / content).write_text("x")
    with pytest.raises(
        CheckpointError, match=f"neither a Hugging Face model .* It holds {content}"
    ):
        open_model(tmp_path)
    with pytest.raises(CheckpointError, match="not a directory"):
        open_model(tmp_path / "absent")


def test_transformers_reads_an_exported_sentencepiece_file_of_any_name(tmp_path):
    from sentencepiece import SentencePieceProcessor

    from megatron_sorted.conversion.tokenizers.check import TEXTS
    from megatron_sorted.data.preparation.train_tokenizer import train_sentencepiece

    save_model(tmp_path / "origin", "llama")
    own = tmp_path / "train_tokenizer.model"
    tokenizer = train_sentencepiece(
        lambda: [*TEXTS, *Path(__file__).read_text(encoding="utf-8").splitlines()], str(own), 700
    )
    model = dataclasses.replace(
        open_model(tmp_path / "origin"), config=None, files={"tokenizer/train_tokenizer.model": own}
    )
    import_model(
        model, tmp_path / "checkpoint", RequestedExits((2,)), WriteOptions(verify=False)
    )  # without a config, as a run's own checkpoint
    assert (
        tmp_path / "checkpoint" / "iter_0000000" / "tokenizer" / "train_tokenizer.model"
    ).read_bytes() == own.read_bytes()
    notes = export_model(open_model(tmp_path / "checkpoint"), tmp_path / "out").notes
    assert len(notes) == 1 and notes[0].startswith(
        "tokenizer.json: built from tokenizer.model, the same ids"
    )
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == own.read_bytes()
    assert not (tmp_path / "out" / "train_tokenizer.model").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    code = (
        "import json, sys; from transformers import AutoTokenizer; "
        "print(json.dumps(AutoTokenizer.from_pretrained(sys.argv[1])(json.load(sys.stdin)).input_ids))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        check=True,
    )
    pieces = SentencePieceProcessor(model_file=str(own))
    assert json.loads(done.stdout) == [[1, *ids] for ids in pieces.encode(list(TEXTS))]
    # An import of the export may continue training with either format of the tokenizer.
    import_model(open_model(tmp_path / "out"), tmp_path / "again", RequestedExits())
    again = open_model(tmp_path / "again")
    assert tokenizer.sha256 in tokenizer_hashes(again.manifest["tokenizer"])
    assert again.open_tokenizer().sha256 in tokenizer_hashes(again.manifest["tokenizer"])
    assert again.open_tokenizer().encode(TEXTS[-1]) == tokenizer.encode(TEXTS[-1])
