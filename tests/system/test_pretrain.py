"""pretrain_sorted.py from prepared data to results; resumed, evaluated, fine-tuned."""

import hashlib
import json
import re
import shutil
from pathlib import Path

from tests.support.command_line import pretrain
from tests.support.commands import run_command

STEP = (
    r"step {}/4  loss @1 \d\.\d{{3}}  @2 \d\.\d{{3}}  @3 \d\.\d{{3}}  @4 \d\.\d{{3}}  "
    r"lr \d\.\d\de-\d\d  grad norm \d+\.\d\d  "
    r"\d+ ms/step  [\d,]+ tokens/s  \w+ left  \d\S* TFLOP/s  \d+\.\d GiB"
)
SAVED = r"saved whole/iter_000000{} in \d+\.\d s \(\d+\.\d MB, training held up for \d+\.\d\d s\)"
NOISE = re.compile("warn|error|Traceback|deprecated", re.IGNORECASE)
NUMBER, SHARE = r" +\d+\.\d{3}", r" +\d+\.\d %"


def evaluation_patterns(name: str, step: int, tokens: int) -> list[str]:
    return [
        rf"evaluation of '{name}' at step {step}: {tokens} tokens, \w+",
        "   exit    loss  tokens right  exact match  agreement  accept length",
        *(rf"  {depth:5d}{NUMBER}{SHARE}{SHARE}{SHARE} +\d\.\d\d" for depth in (1, 2, 3, 4)),
    ]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(line: dict) -> dict:
    """Return a line of metrics without the values that depend on clock and machine."""
    clock = (
        "time",
        "seconds",
        "step_seconds",
        "tokens_per_second",
        "seconds_left",
        "tokens_per_second_per_device",
        "tflops_per_device",
        "memory_bytes",
    )
    return {key: value for key, value in line.items() if key not in clock}


def test_the_console_prints_each_fact_once(trained):
    folder, done = trained
    first, second = (
        json.loads((folder / f"data/{name}.json").read_text())["train"]["trained_tokens"]
        for name in ("first", "second")
    )
    evaluations = {
        step: [
            *evaluation_patterns("first", step, first),
            *evaluation_patterns("second", step, second),
        ]
        for step in (2, 4)
    }
    patterns = [
        r"2 processes on cpu: tp 1 x pp 2 x dp 1, fp32, 4 samples of 64 tokens a step \(2 "
        r"micro-batches of 2 on each data parallel rank\)",
        "4 layers, hidden 32, vocabulary 300; parameters of the sub-model at each exit: @1 26.1K, "
        "@2 42.5K, @3 59.0K, @4 75.4K",
        "stage 0: layers 1-2, exits 1 2",
        "stage 1: layers 3-4, exits 3 4",
        "note: prompt form: plain; answers end with </s>",
        r"training data: 200 documents in \d+ samples of 64 positions, \d\d\.\d % filled",
        STEP.format(1),
        STEP.format(2),
        *evaluations[2],
        STEP.format(3),
        STEP.format(4),
        *evaluations[4],
        "wrote whole/evaluation.json",
    ]
    lines = [line for line in done.stdout.splitlines() if not line.startswith("saved")]
    # saves end in the background, so their lines stand between any lines that follow
    saved = [line for line in done.stdout.splitlines() if line.startswith("saved")]
    assert len(saved) == 2 and all(
        re.fullmatch(SAVED.format(step), line) for step, line in zip((2, 4), saved, strict=True)
    ), saved
    assert len(lines) == len(patterns), done.stdout
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), line
    assert not NOISE.search(done.stderr), done.stderr


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_of_a_run(trained):
    folder, _ = trained
    save = folder / "whole"
    assert sorted(path.name for path in save.iterdir()) == [
        ".lock",
        "evaluation.json",
        "iter_0000002",
        "iter_0000004",
        "latest_checkpointed_iteration.txt",
        "metrics.jsonl",
        "run.json",
    ]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "4"
    for step in (2, 4):
        names = {path.name for path in (save / f"iter_{step:07d}").iterdir()}
        assert {".metadata", "metadata.json", "common.pt", "manifest.json", "tokenizer"} < names
        ranks = {name.split("_")[2] for name in names if name.startswith("__")}
        assert ranks == {"0", "1"}, "shards of both ranks"
        manifest = json.loads((save / f"iter_{step:07d}" / "manifest.json").read_text())
        assert (
            manifest["progress"] == {"step": step, "samples": 4 * step}
            and manifest["samples_a_step"] == 4
        )
        assert manifest["layout"] == {
            "world_size": 2,
            "tensor": 1,
            "stages": 2,
            "data": 1,
            "chunks": 1,
            "random_place": [2, 1],
        }
        assert (
            manifest["shape"]["exit_layer_nums"] == [1, 2, 3, 4] == manifest["exits"]["depths"]
            and manifest["settings"]["train_iters"] == 4
        )
        assert set(manifest["exits"]["coefficients"].values()) == {0.25}
        assert manifest["run_id"] == json.loads((save / "run.json").read_text())["run_id"]
        assert set(manifest["versions"]) == {"megatron_sorted", "megatron_core", "torch", "python"}
        tokenizer = save / f"iter_{step:07d}" / "tokenizer" / "tokenizer.model"
        assert tokenizer.read_bytes() == (folder / "data" / "train_tokenizer.model").read_bytes()
        assert manifest["tokenizer"] == {
            "type": "SentencePieceTokenizer",
            "name": "train_tokenizer.model",
            "sha256": sha256(tokenizer),
        }
        for name, of_file in manifest["files"].items():
            path = save / f"iter_{step:07d}" / name
            assert of_file == {"bytes": path.stat().st_size, "sha256": sha256(path)}
    lines = read_lines(save / "metrics.jsonl")
    assert [(line["kind"], line["step"], line.get("name")) for line in lines] == [
        ("train", 1, None),
        ("train", 2, None),
        ("evaluation", 2, "first"),
        ("evaluation", 2, "second"),
        ("train", 3, None),
        ("train", 4, None),
        ("evaluation", 4, "first"),
        ("evaluation", 4, "second"),
    ]
    for line in lines:
        assert list(line["exits"]) == ["1", "2", "3", "4"]
        if line["kind"] == "train":
            assert (
                line["samples"] == 4 * line["step"]
                and line["total_steps"] == 4
                and line["skipped"] == 0
            )
            assert all(numbers["coefficient"] == 0.25 for numbers in line["exits"].values())
    # one process evaluates nothing by chance: an untrained network gives log(300) = 5.70
    assert 5.5 < lines[0]["exits"]["4"]["loss"] < 5.9 and lines[-1]["exits"]["4"]["loss"] < 5.2
    results = json.loads((save / "evaluation.json").read_text())
    assert (results["run"], results["step"], list(results["sets"])) == (
        "whole",
        4,
        ["first", "second"],
    )
    # by hand: 300 x 32 + 32 outside, a layer 4 x 32 x 32 + 3 x 32 x 128 + 2 x 32
    assert results["exits"]["3"]["parameters"] == 9632 + 3 * 16448
    for line in lines[-2:]:
        for depth, numbers in line["exits"].items():
            assert results["sets"][line["name"]][depth] == {
                key: numbers[key] for key in ("loss", "token_accuracy", "exact_match")
            }


def test_a_resumed_run_repeats_the_uninterrupted_one(trained):
    folder, _ = trained
    shutil.copytree(folder / "whole" / "iter_0000002", folder / "half" / "iter_0000002")
    (folder / "half" / "latest_checkpointed_iteration.txt").write_text("2")
    printed = pretrain(
        2, folder, "--config", "run.yaml", "--load", "half", "--metrics-file", "rest.jsonl"
    )
    (loaded,) = [line for line in printed if line.startswith("loaded ")]
    # cosine over --lr-decay-iters 6: (1 + cos(pi / 3)) / 2 of 1e-2 after two steps
    assert (
        loaded
        == "loaded half/iter_0000002: step 2, 8 samples consumed, learning rate 7.500e-03; nothing "
        "changed"
    )
    whole, rest = (read_lines(folder / name) for name in ("whole/metrics.jsonl", "rest.jsonl"))
    assert [untimed(line) for line in rest] == [untimed(line) for line in whole[4:]]


def test_one_process_evaluates_to_the_same_numbers(trained):
    folder, _ = trained
    done = run_command(
        "pretrain_sorted.py",
        "--config",
        "run.yaml",
        "--pipeline-model-parallel-size",
        1,
        "--skip-train",
        "--load",
        "whole",
        "--save",
        "again",
        cwd=folder,
    )
    assert done.returncode == 0 and not NOISE.search(done.stderr), done.stderr
    assert "loaded whole/iter_0000004: step 4" in done.stdout and "training data" not in done.stdout
    before, after = (
        json.loads((folder / name / "evaluation.json").read_text()) for name in ("whole", "again")
    )
    assert after == {**before, "run": "again"}
    assert not (folder / "again" / "latest_checkpointed_iteration.txt").exists()


def test_finetune_takes_the_weights_and_starts_at_step_0(trained):
    folder, _ = trained
    printed = pretrain(
        1,
        folder,
        "--config",
        "run.yaml",
        "--pipeline-model-parallel-size",
        1,
        "--finetune",
        "--load",
        "whole",
        "--train-iters",
        1,
        "--eval-interval",
        "none",
        "--metrics-file",
        "tuned.jsonl",
    )
    assert "loaded whole/iter_0000004: weights only, starting at step 0" in printed
    first, before = (
        read_lines(folder / "tuned.jsonl")[0],
        read_lines(folder / "whole" / "metrics.jsonl")[0],
    )
    assert (first["step"], first["samples"], first["learning_rate"]) == (
        1,
        4,
        before["learning_rate"],
    )
    # the same batch as the first of the run before, which has learned since
    assert all(
        first["exits"][depth]["loss"] < before["exits"][depth]["loss"] - 0.3
        for depth in first["exits"]
    )


def test_a_finished_run_is_left_as_it_is(trained):
    folder, _ = trained
    shutil.copytree(folder / "whole", folder / "finished")
    stamp = (folder / "finished" / "iter_0000004" / "manifest.json").stat().st_mtime_ns
    printed = pretrain(
        2, folder, "--config", "run.yaml", "--load", "finished", "--save", "finished"
    )
    assert "nothing to train: step 4 of --train-iters 4 is reached" in printed and not any(
        "saved" in line for line in printed
    )
    assert (folder / "finished" / "iter_0000004" / "manifest.json").stat().st_mtime_ns == stamp
