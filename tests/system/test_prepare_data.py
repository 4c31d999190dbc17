"""tools/prepare_data.py, from JSON lines to samples ready to train on."""

import gzip
import json
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_sorted.data.preparation.train_tokenizer import train_sentencepiece
from megatron_sorted.data.samples.corpus import Corpus
from megatron_sorted.data.samples.dataset import open_samples
from megatron_sorted.data.tokenizer import load_tokenizer
from tests.support.commands import run_command

ROOT = Path(__file__).resolve().parents[2]
# 400 samples with some of 300 kB, and 40 huge ones without a response: 15 blocks of unequal work,
# which workers finish out of order.
SAMPLES = [
    {
        "instruction": f"Count to {i} in größer 猫",
        "input": "" if i % 3 else f"start at {i // 2}",
        "output": " ".join(str(n) for n in range(i % 40 + 1))
        + " long" * (60000 if i % 50 == 7 else 0),
    }
    for i in range(400)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with samples, plain and gzipped, and a tokenizer."""
    path = tmp_path_factory.mktemp("prepare")
    empty = "\n" + json.dumps({"instruction": "huge " * 64000, "output": ""})
    lines = [
        json.dumps(sample, ensure_ascii=i % 2 == 0) + empty * (i % 10 == 5)
        for i, sample in enumerate(SAMPLES)
    ]
    (path / "a.jsonl").write_text("\n".join(lines[:150]) + "\n", encoding="utf-8")
    with gzip.open(path / "b.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write("\n".join(lines[150:]))
    train_sentencepiece(
        lambda: [sample["instruction"] + " " + sample["output"][:200] for sample in SAMPLES],
        str(path / "t.model"),
        300,
    )
    return path


def test_workers_make_the_same_bytes_and_samples_hold_all_of_it(folder):
    common = [
        "--input",
        "a.jsonl",
        "b.jsonl.gz",
        "--tokenizer-model",
        "t.model",
        "--seq-length",
        256,
        "--valid-fraction",
        0.2,
    ]
    for workers in (1, 2, 3):
        done = run_command(
            "tools/prepare_data.py",
            *common,
            "--output-prefix",
            f"out/w{workers}",
            "--workers",
            workers,
            cwd=folder,
        )
        assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (folder / "out").iterdir())
    assert len(names) == 15 and not any(name.endswith("partial") for name in names)
    for name in names:
        if name.startswith("w1") and not name.endswith(".json"):
            for workers in (2, 3):
                assert (folder / "out" / name).read_bytes() == (
                    folder / "out" / f"w{workers}{name[2:]}"
                ).read_bytes()
    report = json.loads((folder / "out" / "w2.json").read_text())
    assert (
        report["samples_read"] == 440
        and report["truncated"] == 8
        and report["skipped"]["count"] == {"empty_response": 40}
    )
    assert (
        report["train"]["documents"] + report["valid"]["documents"] == 400
        and 40 < report["valid"]["documents"] < 120
    )
    assert report["data_format"] == "instruction" and report["tokenizer"]["vocab_size"] == 300
    # The table shows the same numbers.
    assert f"documents                    {report['train']['documents']}\n" in done.stdout
    assert "truncated                    8\n" in done.stdout

    tokenizer = load_tokenizer("SentencePieceTokenizer", str(folder / "t.model"))
    seen = []
    for part in ("", "_valid"):
        prefix = str(folder / "out" / f"w2{part}_text_document")
        samples = open_samples(Corpus([prefix]), 256, 300, 0, seed=1)
        masks = sum(
            int(samples.sample(i).loss_mask_s.sum()) for i in range(samples.samples_per_epoch)
        )
        assert masks == report["valid" if part else "train"]["trained_tokens"]
        theirs = IndexedDataset(prefix, multimodal=True)
        assert len(theirs) == 2 * (len(theirs.document_indices) - 1)
        for document in range(len(theirs.document_indices) - 1):
            (prompt, prompt_mode), (response, response_mode) = (
                theirs[2 * document],
                theirs[2 * document + 1],
            )
            assert (int(prompt_mode), int(response_mode)) == (0, 1) and prompt[
                0
            ] == tokenizer.bos_id
            if len(prompt) + len(response) < 257:
                assert response[-1] == tokenizer.eos_id
                seen.append(
                    (
                        tokenizer.decode(prompt[1:].tolist()),
                        tokenizer.decode(response[:-1].tolist()),
                    )
                )
    expected = [
        (f"{s['instruction']}\n" + (f"{s['input']}\n" if s["input"] else ""), s["output"])
        for s in SAMPLES
        if "long" not in s["output"]
    ]
    assert sorted(seen) == sorted(expected)


def test_train_tokenizer_and_text_format(tmp_path):
    texts = [f"Story {i}: the cat of house {i * i} sat.\nThe end." for i in range(300)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = run_command(
        "tools/prepare_data.py",
        "--input",
        "t.jsonl",
        "--output-prefix",
        "p",
        "--train-tokenizer",
        300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "p.json",
        "p_text_document.bin",
        "p_text_document.idx",
        "p_tokenizer.model",
        "t.jsonl",
    ]
    theirs = IndexedDataset(str(tmp_path / "p_text_document"), multimodal=False)
    tokenizer = load_tokenizer("SentencePieceTokenizer", str(tmp_path / "p_tokenizer.model"))
    assert (
        len(theirs) == 300
        and [tokenizer.decode(theirs[i][1:-1].tolist()) for i in range(300)] == texts
    )
    report = json.loads((tmp_path / "p.json").read_text())
    assert (
        report["tokenizer"]["sha256"] == tokenizer.sha256
        and report["train"]["tokens"] - 300 == report["train"]["trained_tokens"]
    )


def test_broken_lines_are_reported_or_stop(folder, tmp_path):
    (tmp_path / "x.jsonl").write_text(
        '\n{"instruction": "Q", "output": "A"}\n{broken\n{"instruction": "Q", "output": ""}\n'
    )
    common = [
        "--input",
        "x.jsonl",
        "--tokenizer-model",
        folder / "t.model",
        "--output-prefix",
        "x",
        "--workers",
        2,
    ]
    stopped = run_command("tools/prepare_data.py", *common, "--strict", cwd=tmp_path)
    assert (
        stopped.returncode == 1
        and "x.jsonl:3: not_json" in stopped.stderr
        and "Traceback" not in stopped.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
    done = run_command("tools/prepare_data.py", *common, cwd=tmp_path)
    assert (
        done.returncode == 0 and "skipped: not_json            1  first at x.jsonl:3" in done.stdout
    )
    assert "skipped: empty_response      1  first at x.jsonl:4" in done.stdout


def test_limit_overwrite_and_stale_files(folder, tmp_path):
    common = [
        "--input",
        folder / "a.jsonl",
        "--tokenizer-model",
        folder / "t.model",
        "--output-prefix",
        "x",
    ]
    assert (
        run_command(
            "tools/prepare_data.py", *common, "--valid-fraction", 0.5, cwd=tmp_path
        ).returncode
        == 0
    )
    refused = run_command("tools/prepare_data.py", *common, "--limit", 5, cwd=tmp_path)
    assert (
        refused.returncode == 1
        and "x_text_document.bin" in refused.stderr
        and "give --overwrite" in refused.stderr
    )
    assert json.loads((tmp_path / "x.json").read_text())["samples_read"] == 165
    assert (
        run_command(
            "tools/prepare_data.py", *common, "--limit", 5, "--overwrite", cwd=tmp_path
        ).returncode
        == 0
    )
    assert json.loads((tmp_path / "x.json").read_text())["train"]["documents"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "x.json",
        "x_text_document.bin",
        "x_text_document.idx",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "absent.jsonl"], "cannot read absent.jsonl"),
        (["--input", "empty.jsonl"], "empty.jsonl holds no JSON lines"),
        (["--input", "empty.jsonl", "--format", "text"], "none of 0 samples can be used"),
        (["--input", "other.jsonl"], "found: prompt, reply"),
        (
            ["--input", "good.jsonl", "--valid-fraction", "0.0001"],
            "--valid-fraction 0.0001: none of 1 documents",
        ),
        (
            ["--input", "good.jsonl", "--format", "messages"],
            "none of 1 samples can be used (1 missing_field)",
        ),
        (
            ["--input", "good.jsonl", "--tokenizer-type", "NullTokenizer", "--vocab-size", "9"],
            "NullTokenizer reads numbers only",
        ),
    ],
)
def test_mistakes_leave_nothing_behind(folder, tmp_path, arguments, message):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "other.jsonl").write_text('{"prompt": 1, "reply": 2}\n')
    (tmp_path / "good.jsonl").write_text('{"instruction": "Q", "output": "A"}\n')
    done = run_command(
        "tools/prepare_data.py",
        "--output-prefix",
        "x",
        "--tokenizer-model",
        folder / "t.model",
        *arguments,
        cwd=tmp_path,
    )
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert len(list(tmp_path.iterdir())) == 3
