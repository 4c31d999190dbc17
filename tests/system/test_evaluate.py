"""tools/evaluate.py: numbers, tasks of lm-evaluation-harness, trained heads and a baseline."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM

from tests.support.commands import run_command
from tests.support.evaluated import TEXTS, write_model

ROOT = Path(__file__).resolve().parents[2]
NOUNS = ("cat", "dog", "house", "bird", "mat", "night", "sign", "mother")
SAMPLES = [
    {
        "question": f"A {NOUNS[i]} and the",
        "choices": [NOUNS[(i * k + 3) % 8] + " ran" * (k % 2) for k in (1, 3, 5)],
        "label": i % 3,
    }
    for i in range(8)
]
TASK = """task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: multiple_choice
test_split: test
process_docs: !function where.keep
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with two models, texts, questions and a task."""
    path = tmp_path_factory.mktemp("evaluate")
    write_model(path / "one", seed=1, max_position_embeddings=128)
    write_model(path / "two", "qwen3", seed=2, tied=False, max_position_embeddings=128)
    (path / "valid.txt").write_text("###".join(TEXTS), encoding="utf-8")
    (path / "train.txt").write_text("###".join(TEXTS * 10), encoding="utf-8")
    (path / "asked.jsonl").write_text(
        "\n".join(
            json.dumps({"question": f"What is {word}?", "answer": word, "aliases": [f"the {word}"]})
            for word in NOUNS
        ),
        encoding="utf-8",
    )
    (path / "tasks").mkdir()
    (path / "samples.jsonl").write_text("\n".join(map(json.dumps, SAMPLES)), encoding="utf-8")
    (path / "tasks" / "tiny.yaml").write_text(
        TASK.format(path=path / "samples.jsonl"), encoding="utf-8"
    )
    # many tasks import Hugging Face's package of that name, which the tool must not hide
    (path / "tasks" / "where.py").write_text(
        """import importlib.util
def keep(samples):
    found = importlib.util.find_spec("evaluate")
    assert found is None or "tools" not in found.origin, found.origin
    return samples
""",
        encoding="utf-8",
    )
    return path


@torch.no_grad()
def accuracy_by_hand(directory, depth):
    """Return the share of samples whose right choice is the most likely one, in plain PyTorch."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, num_hidden_layers=depth, dtype=torch.float32
    )
    pieces, right = SentencePieceProcessor(model_file=str(directory / "tokenizer.model")), 0
    for sample in SAMPLES:
        scores = []
        for choice in sample["choices"]:
            num_context = 1 + len(pieces.encode(sample["question"]))
            ids = torch.tensor([[1, *pieces.encode(f"{sample['question']} {choice}")]])
            log_p = model(ids[:, :-1]).logits[0].double().log_softmax(-1)
            scores.append(
                sum(
                    float(log_p[place - 1, ids[0, place]])
                    for place in range(num_context, ids.shape[1])
                )
            )
        right += max(range(3), key=lambda place, scores=scores: scores[place]) == sample["label"]
    return right / len(SAMPLES)


@torch.no_grad()
def nats_by_hand(directory, depth):
    """Return total nats and number of tokens of the texts."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, num_hidden_layers=depth, dtype=torch.float32
    )
    pieces, nats, count = (
        SentencePieceProcessor(model_file=str(directory / "tokenizer.model")),
        0.0,
        0,
    )
    for text in TEXTS:
        ids = torch.tensor([[1, *pieces.encode(text)]])
        nats += float(
            torch.nn.functional.cross_entropy(
                model(ids[:, :-1]).logits[0].double(), ids[0, 1:], reduction="sum"
            )
        )
        count += ids.shape[1] - 1
    return nats, count


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_tasks_of_the_harness_are_what_plain_pytorch_counts(folder):
    done = run_command(
        "tools/evaluate.py",
        "one",
        "--tasks",
        "tiny_choice",
        "--tasks-path",
        "tasks",
        "--output",
        "tasks_out",
        cwd=folder,
        HF_DATASETS_CACHE=str(folder / "cache"),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "tasks_out" / "evaluation.json").read_text())
    exits = results["tasks"]["tiny_choice"]["models"]["one"]["exits"]
    values = {depth: exits[str(depth)]["acc"]["value"] for depth in (1, 2, 3)}
    assert values == {depth: accuracy_by_hand(folder / "one", depth) for depth in (1, 2, 3)}
    assert (
        len(set(values.values())) > 1
        and exits["1"]["samples"] == 8
        and "lm_eval" in results["versions"]
    )
    assert f"{values[1]:.4f} ± {math.sqrt(values[1] * (1 - values[1]) / 7):.4f}" in done.stdout
    unknown = run_command(
        "tools/evaluate.py", "one", "--tasks", "no_such_task", "--tasks-path", "tasks", cwd=folder
    )
    assert (
        unknown.returncode == 1
        and "error: --tasks: lm-evaluation-harness knows no 'no_such_task'" in unknown.stderr
    )


def test_texts_questions_and_a_baseline_with_heads(folder):
    done = run_command(
        "tools/evaluate.py",
        "one",
        "--baseline",
        "other=two",
        "--train-heads",
        "train.txt",
        "--save-heads",
        "saved",
        "--text",
        "valid.txt",
        "--separator",
        "###",
        "--questions",
        "asked.jsonl",
        "--shots",
        2,
        "--max-new-tokens",
        6,
        "--output",
        "out",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "out" / "evaluation.json").read_text())
    assert (
        list(results["models"]) == ["one", "other", "other+ICT"]
        and results["settings"]["seq_length"] == 128
    )
    text, num_bytes = results["texts"]["valid"], sum(len(part.encode()) for part in TEXTS)
    assert (text["documents"], text["bytes"]) == (4, num_bytes)
    for name, directory in (("one", "one"), ("other", "two")):
        for depth in (1, 2, 3):
            numbers, (nats, count) = (
                text["models"][name]["exits"][str(depth)],
                nats_by_hand(folder / directory, depth),
            )
            assert text["models"][name]["tokens"] == count and numbers["loss"] == pytest.approx(
                nats / count, rel=1e-6
            )
            assert numbers["bits_per_byte"] == pytest.approx(
                nats / math.log(2) / num_bytes, rel=1e-6
            )
            assert numbers["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    loss = {name: model["exits"]["1"]["loss"] for name, model in text["models"].items()}
    assert text["models"]["one"]["exits"]["1"]["loss_minus"]["other"]["value"] == pytest.approx(
        loss["one"] - loss["other"]
    )
    assert (
        loss["other+ICT"] < loss["other"] - 0.3
        and results["models"]["other+ICT"]["trained_heads"]["num_steps"] == 5
    )
    assert (
        text["models"]["other+ICT"]["exits"]["3"]["loss"]
        == text["models"]["other"]["exits"]["3"]["loss"]
    )
    assert set(results["questions"]["asked"]["models"]["one"]["exits"]["2"]) >= {
        "exact_match",
        "f1",
        "exact_match_with_case",
    }
    answers = [
        json.loads(line)
        for line in (folder / "out" / "answers_asked.jsonl").read_text().splitlines()
    ]
    assert len(answers) == 8 and set(answers[0]["answers"]) == set(results["models"])
    assert answers[0]["prompt"].endswith("What is cat?\nAnswer:")
    assert (
        folder / "out" / "evaluation.png"
    ).stat().st_size > 20_000 and "other+ICT" in done.stdout
    # the nested directory that was written gives the same numbers
    again = run_command(
        "tools/evaluate.py",
        "saved",
        "--text",
        "valid.txt",
        "--separator",
        "###",
        "--output",
        "again",
        cwd=folder,
    )
    assert again.returncode == 0, again.stderr
    saved = json.loads((folder / "again" / "evaluation.json").read_text())["texts"]["valid"][
        "models"
    ]["saved"]["exits"]
    assert {depth: numbers["loss"] for depth, numbers in saved.items()} == {
        depth: numbers["loss"] for depth, numbers in text["models"]["other+ICT"]["exits"].items()
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "--text", "valid.txt"], "none: no such directory"),
        (["one"], "nothing to measure"),
        (
            ["one", "two", "--text", "valid.txt", "--seq-length", 500],
            "--seq-length: 500 is more than the 128 positions of one",
        ),
        (["one", "one", "--text", "valid.txt"], "two models are called one"),
        (["one", "--text", "missing.txt"], "missing.txt: cannot be read"),
        (["one", "--text", "valid.txt", "--depths", 9], "--depths: 9 is not a layer of"),
        (
            ["one", "--text", "valid.txt", "--stride", 300],
            "--stride: 300 is more than --seq-length 128",
        ),
        (
            [
                "one",
                "two",
                "--text",
                "valid.txt",
                "--train-heads",
                "train.txt",
                "--save-heads",
                "x",
            ],
            "--save-heads writes one directory",
        ),
        (["one", "--questions", "samples.jsonl"], "samples.jsonl:1: no answer"),
    ],
)
def test_mistakes_are_one_line(folder, arguments, message):
    done = run_command("tools/evaluate.py", *arguments, cwd=folder)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr, (
        done.stderr
    )
    assert len(done.stderr.strip().splitlines()) == 1
