"""megatron-sorted evaluate --by-position: files and tables, against plain transformers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from megatron_sorted.commands.options.evaluation import read_arguments
from megatron_sorted.errors import SettingsError
from tests.support.commands import run_command
from tests.support.evaluated import TEXTS, write_model

LENGTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with two models of 16 positions, one that cannot be read, and a text."""
    path = tmp_path_factory.mktemp("positions")
    write_model(path / "one", seed=1, max_position_embeddings=16)
    write_model(path / "two", seed=2, max_position_embeddings=16)
    shutil.copytree(path / "one", path / "empty")
    tensors = load_file(path / "one" / "model.safetensors")
    tensors["nothing"] = tensors.pop("model.norm.weight")  # is noticed when weights are read
    save_file(tensors, path / "empty" / "model.safetensors")
    (path / "valid.txt").write_text("###".join(TEXTS * 3), encoding="utf-8")
    return path


@torch.no_grad()
def losses_by_hand(directory, depth):
    """Return the loss of each position of every whole window of the joined texts [w, s]."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, num_hidden_layers=depth, dtype=torch.float32
    )
    pieces = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    ids = [token for text in TEXTS * 3 for token in (1, *pieces.encode(text))]
    rows = []
    for first in range(0, len(ids) - LENGTH, LENGTH):
        window = torch.tensor(ids[first : first + LENGTH + 1])
        losses_s = cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="none")
        rows.append(torch.where(window[1:] == 1, torch.nan, losses_s))  # bos is not counted
    return torch.stack(rows).double()


def test_losses_by_position_of_two_models(folder):
    done = run_command(
        *("tools/evaluate.py", "one", "--baseline", "other=two", "--text", "valid.txt"),
        *("--separator", "###", "--by-position", "--length", LENGTH, "--join-documents"),
        *("--position-buckets", 10, "--output", "out"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "out" / "evaluation.json").read_text())
    assert results["texts"] == {} and results["settings"]["positions"] == {
        "length": LENGTH,
        "joined": True,
        "buckets": [[1, 10], [11, 20], [21, 30], [31, 32]],
    }
    models = results["positions"]["valid"]["models"]
    for name, directory in (("one", "one"), ("other", "two")):
        for depth in (1, 2, 3):
            losses_ws = losses_by_hand(folder / directory, depth)
            for number, (first, last) in enumerate(results["settings"]["positions"]["buckets"]):
                numbers = models[name]["buckets"][number][str(depth)]
                inside = losses_ws[:, first - 1 : last]
                assert numbers["loss"] == pytest.approx(float(inside.nanmean()), abs=1e-5)
                assert numbers["tokens"] == int((~inside.isnan()).sum())
    one, other = (models[name]["buckets"][2]["2"]["loss"] for name in ("one", "other"))
    minus = models["one"]["buckets"][2]["2"]["loss_minus"]["other"]
    assert minus["value"] == pytest.approx(one - other)
    assert f"{one:.4f} ± " in done.stdout and f"{one - other:+.4f} ± " in done.stdout
    assert "21-30  one - other" in done.stdout and "valid: accuracy by position" in done.stdout
    assert (folder / "out" / "positions.png").stat().st_size > 20_000
    assert not (folder / "out" / "evaluation.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", 500], "--length: 500 tokens are more than the 59 of the longest document"),
        (["--position-buckets", 17], "--position-buckets: 17 positions are more than the 16"),
        (["--stride", 8], "--stride: 8 with --by-position, whose windows do not overlap"),
        (["--seq-length", 8], "--seq-length: 8 with --by-position, whose windows have a length"),
    ],
)
def test_mistakes_are_refused_before_weights_are_read(folder, arguments, message):
    options = ("--by-position", "--text", "valid.txt", "--separator", "###")
    done = run_command("tools/evaluate.py", "empty", *options, *arguments, cwd=folder)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_options_that_do_not_fit_are_refused(capsys):
    for arguments, message in (
        ("--by-position --questions x.jsonl", "--by-position: there is no text to measure on."),
        ("--text x --length 9", "--length: applies to losses by position"),
        ("--text x --join-documents", "--join-documents: applies to losses by position"),
        ("--text x --position-buckets powers", "--position-buckets: applies to losses"),
    ):
        with pytest.raises(SettingsError, match=message):
            read_arguments(["model", *arguments.split()])
    for value in ("ten", "0", "-3"):
        with pytest.raises(SystemExit):
            read_arguments(["model", "--text", "x", "--by-position", f"--position-buckets={value}"])
        assert f"'{value}' is no number of positions above 0" in capsys.readouterr().err
