"""The decoding commands: coloured text, tuning, benchmark, adaptive server, errors in one line."""

import hashlib
import json
import signal
import subprocess
from pathlib import Path

import pytest

from megatron_sorted.data.preparation.train_tokenizer import train_sentencepiece
from tests.support.commands import run_command, start_command
from tests.support.evaluated import TEXTS, write_model
from tests.support.ports import free_port, until_it_answers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoding")
    write_model(folder / "tiny", seed=1, num_layers=4, max_position_embeddings=256)
    questions = [
        {"question_id": 1, "category": "writing", "turns": ["a b c", "d e"]},
        {"question_id": 2, "category": "qa", "turns": ["b"]},
        {"question_id": 3, "category": "rag", "turns": ["c d"]},
    ]
    (folder / "questions.jsonl").write_text(
        "".join(json.dumps(question) + "\n" for question in questions)
    )
    return folder


def test_texts_are_written_and_coloured_by_exit(place):
    ask = ("tiny", "--depths", 1, 2, 3, "--prompt", "a b", "--max-new-tokens", 12)
    plain = run_command("tools/generate.py", *ask, cwd=place)
    assert plain.returncode == 0, plain.stderr
    assert "full: 12 tokens" in plain.stderr and "\x1b" not in plain.stdout
    coloured = run_command(
        "tools/generate.py", *ask, "--strategy", "tree", "--colour", "always", cwd=place
    )
    assert coloured.returncode == 0, coloured.stderr
    assert "\x1b[38;5;" in coloured.stdout and "drafted tokens accepted" in coloured.stderr
    both = run_command(
        "tools/generate.py", *ask, "--prompt", "c", "--strategy", "self_speculative", cwd=place
    )
    assert "--- prompt 0: 'a b'" in both.stdout and "--- prompt 1: 'c'" in both.stdout
    chat = run_command(
        "tools/generate.py",
        "tiny",
        "--chat",
        "--max-new-tokens",
        4,
        cwd=place,
        text="hello\nagain\n\n",
    )
    assert chat.returncode == 0 and chat.stderr.count("full: ") == 2, chat.stderr


def test_tuned_options_are_used_by_other_commands(place):
    few = ("--questions", "questions.jsonl", "--max-new-tokens", 8, "--num-prompts", 2)
    done = run_command("tools/tune_decoding.py", "tiny", "--depths", 1, 2, *few, cwd=place)
    assert done.returncode == 0, done.stderr
    kept = json.loads((place / "tiny" / "decoding.json").read_text())
    assert {"full", "self_speculative", "sorted_speculative", "tree"} <= set(
        kept["strategies"]
    ) and kept["best"] in kept["strategies"]
    tuned = run_command(
        "tools/generate.py",
        "tiny",
        "--depths",
        1,
        2,
        "--prompt",
        "a",
        "--max-new-tokens",
        4,
        cwd=place,
    )
    assert tuned.returncode == 0 and f"strategy: {kept['best']}]" in tuned.stderr
    ask = (
        "--depths",
        1,
        2,
        "--questions",
        "questions.jsonl",
        "--max-new-tokens",
        6,
        "--output",
        "out",
        "--sweep",
        "--batches",
        1,
        2,
        "--text",
        "held_out.txt",
        "--text-separator",
        "|",
        "--num-prompts",
        2,
    )
    (place / "held_out.txt").write_text("a b c d e f g | h i j k")
    measured = run_command("tools/benchmark_decoding.py", "tiny", *ask, cwd=place)
    assert measured.returncode == 0, measured.stderr
    scores = json.loads((place / "out" / "decoding.json").read_text())
    assert set(scores) == {
        "all",
        "multi-turn conversation",
        "question answering",
        "retrieval-augmented generation",
    }
    assert {"full", "self_speculative", "sorted_speculative", "tree", "transformers"} <= set(
        scores["all"]
    )
    assert all(one["same"] == 1.0 for name, one in scores["all"].items() if name != "early_exit"), (
        "all strategies write the same text"
    )
    page = (place / "out" / "decoding.md").read_text()
    assert measured.stdout.startswith(page), "the page is what is printed"
    assert (
        "batch 2: tokens/s" in page
        and "## Draft depth x draft length" in page
        and "## Quality over speed" in page
    )
    assert all(
        (place / "out" / f"{name}.png").stat().st_size > 10_000 for name in ("sweep", "curve")
    )
    line = json.loads((place / "out" / "answers_tree.jsonl").read_text().splitlines()[0])
    [choice] = line["choices"]
    assert (
        line["question_id"] == 1
        and len(choice["turns"]) == 2
        and sum(choice["accept_lengths"]) == sum(choice["new_tokens"])
    )
    assert (place / "out" / "decoding.png").stat().st_size > 10_000


def test_options_tuned_with_a_draft_model_are_used_with_it(place):
    write_model(place / "small", seed=2, num_layers=1, max_position_embeddings=256)
    write_model(
        place / "filled", seed=5, num_layers=2, max_position_embeddings=256, vocab_size=320
    )  # the same tokenizer, padded
    write_model(place / "foreign", seed=5, num_layers=2, max_position_embeddings=256)
    train_sentencepiece(
        lambda: [text[::-1] for text in TEXTS], str(place / "foreign" / "tokenizer.model"), 300
    )
    (place / "tiny" / "decoding.json").write_text(
        json.dumps({"format": 1, "best": "full", "strategies": {"full": {}}})
    )
    few = ("--questions", "questions.jsonl", "--max-new-tokens", 6, "--num-prompts", 2)
    done = run_command("tools/tune_decoding.py", "tiny", "--draft", "small", *few, cwd=place)
    assert (
        done.returncode == 0
        and "exits 1 of small, which drafts for a model with 4 layers" in done.stdout
    ), done.stderr
    kept = json.loads((place / "tiny" / "decoding.json").read_text())
    [part] = kept.pop("drafts").values()
    assert kept == {"format": 1, "best": "full", "strategies": {"full": {}}}, (
        "what was tuned without a draft stays"
    )
    assert (
        part["name"] == "small"
        and part["config_sha256"]
        == hashlib.sha256((place / "small" / "config.json").read_bytes()).hexdigest()
    )
    assert (
        set(part["strategies"]) == {"self_speculative", "sorted_speculative", "tree"}
        and "full" in part["tokens_per_second"]
    )
    ask = ("tiny", "--prompt", "a", "--max-new-tokens", 4)
    assert (
        f"drafts by small; strategy: {part['best']}]"
        in run_command("tools/generate.py", *ask, "--draft", "small", cwd=place).stderr
    )
    assert "strategy: full]" in (plain := run_command("tools/generate.py", *ask, cwd=place)).stderr
    filled = run_command(
        "tools/generate.py", *ask, "--strategy", "self_speculative", "--draft", "filled", cwd=place
    )
    assert filled.returncode == 0 and filled.stdout == plain.stdout, filled.stderr
    measured = run_command(
        "tools/benchmark_decoding.py",
        "tiny",
        "--draft",
        "small",
        *few[:4],
        "--per-group",
        1,
        "--output",
        "drafted",
        cwd=place,
    )
    assert measured.returncode == 0, measured.stderr
    scores = json.loads((place / "drafted" / "decoding.json").read_text())["all"]
    assert (
        {"full", *part["strategies"]} <= set(scores)
        and "early_exit" not in scores
        and all(one["same"] == 1 for one in scores.values())
    )
    refused = run_command("tools/tune_decoding.py", "tiny", "--draft", "foreign", *few, cwd=place)
    assert refused.returncode == 1, refused.stdout
    assert (
        "draft model: its tokenizer (300 tokens) gives other numbers than the model's (300)."
        in refused.stderr
    )
    assert "measuring" not in refused.stdout and "recording" not in refused.stderr
    (place / "tiny" / "decoding.json").write_text("{")
    damaged = run_command("tools/tune_decoding.py", "tiny", "--draft", "small", *few, cwd=place)
    assert (
        damaged.returncode == 1
        and "decoding.json: not JSON" in damaged.stderr
        and "recording" not in damaged.stderr
    )


def test_a_server_adapts_and_keeps_what_it_learned_when_it_is_stopped(place):
    pytest.importorskip("uvicorn", reason="serving is an extra")
    port = free_port()
    (place / "tiny" / "decoding.json").unlink(missing_ok=True)
    ask = ("tiny", "--depths", 1, 2, "--adapt", "--port", port)
    with start_command(
        "tools/serve.py",
        *ask,
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        try:
            opening = next(
                line for line in iter(server.stdout.readline, "") if "strategy: " in line
            )  # notes come first
            assert (
                "strategy: the fastest of full, self_speculative, sorted_speculative, tree"
                in opening
            )
            request = json.dumps(
                {"prompt": "a b", "max_tokens": 5, "temperature": 0, "task": "letters"}
            ).encode()
            texts = {
                until_it_answers(server, port, "/v1/completions", request)["choices"][0]["text"]
                for _ in range(4)
            }
            learned = until_it_answers(server, port, "/v1/adaptation")
            server.send_signal(signal.SIGTERM)
            server.wait(60)
        finally:
            server.kill()
    assert len(texts) == 1 and [row["times"] for row in learned["tasks"]["letters"]] == [1, 1, 1, 1]
    kept = json.loads((place / "tiny" / "decoding_bandit.json").read_text())
    assert [times for times, _, _ in kept["tasks"]["letters"]] == [1, 1, 1, 1] and kept[
        "draft"
    ] is None
    for more, message in (
        (("--strategy", "tree"), "--adapt beside --strategy tree"),
        ((), "so there is nothing to choose"),
    ):
        refused = run_command("tools/serve.py", "tiny", "--adapt", *more, cwd=place)
        assert refused.returncode == 1 and message in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "--prompt", "a"], "none: no such directory"),
        (["tiny"], "Give --prompt, --prompt-file or --chat"),
        (
            ["tiny", "--prompt", "a", "--strategy", "tree"],
            "the model has no exits before its last layer, so only strategy full works",
        ),
        (["tiny", "--depths", 9, "--prompt", "a"], "depth 9 is not a layer of this model"),
        (
            [
                "tiny",
                "--depths",
                1,
                2,
                "--prompt",
                "a",
                "--strategy",
                "early_exit",
                "--exit-layers",
                1,
                2,
                "--thresholds",
                0.5,
            ],
            "thresholds: 1 values for 2 exits (1, 2)",
        ),
        (
            ["tiny", "--prompt", "a", "--strategy", "full", "--num-draft-tokens", 3],
            "--strategy full does not take num draft tokens",
        ),
        (["tiny", "--prompt", "a " * 300], "are more than the model's context of 256"),
        (["tiny", "--prompt", "a", "--temperature", -1], "temperature: -1.0 is not 0 or more"),
        (
            ["tiny", "--prompt-file", "none.txt"],
            "none.txt: cannot be read (No such file or directory). Give --prompt-file",
        ),
        (
            ["tiny", "--prompt-file", "tiny/model.safetensors"],
            "tiny/model.safetensors, line 1: not UTF-8 at byte",
        ),
        (["tiny", "--prompt", "a", "--max-new-tokens", 0], "--max-new-tokens: 0 is not 1 or more"),
        (["tiny", "--prompt", "a", "--stop", ""], "stop: a stop sequence is empty"),
    ],
)
def test_mistakes_are_one_line(place, arguments, message):
    (place / "tiny" / "decoding.json").unlink(missing_ok=True)
    done = run_command("tools/generate.py", *arguments, cwd=place)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
