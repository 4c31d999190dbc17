"""evaluate --data-path against the run's own evaluation.

One command prepares the data, another trains, a third measures.
"""

import json

import pytest
import torch

from tests.support.commands import run_command
from tests.support.layouts import thinned
from tests.support.tokenizer_directories import LINES, make_directory

LENGTH = 24
# {tokenizer directory: (format of the data, flags of the run)}; a Hugging Face directory does not
# record the flags
ROWS = {
    "byte_level": ("text", ()),
    "byte_level_added": ("instruction", ()),
    "nfkc": ("text", ("--no-reset-attention-mask",)),
    "prefix_on": ("messages", ()),
    "prefix_off": ("text", ("--no-eod-mask-loss", "--no-reset-position-ids")),
    "pieces_bpe": ("text", ()),
    "pieces_unigram": ("instruction", ()),
    "both": ("text", ("--no-reset-attention-mask", "--eod-mask-loss")),
    "bos_by_config": ("text", ()),
    "bos_by_rule": ("messages", ()),
    "bos_by_class": ("text", ()),
    "qwen2": ("instruction", ()),
}
EVERYDAY = ("byte_level", "prefix_on", "both", "bos_by_config")


def write_lines(path, kind: str, lines) -> None:
    records = {
        "text": lambda line: {"text": line},
        "instruction": lambda line: {"instruction": line, "output": line[::-1]},
        "messages": lambda line: {
            "messages": [
                {"role": "user", "content": line},
                {"role": "assistant", "content": line[:9]},
            ]
        },
    }
    path.write_text(
        "".join(json.dumps(records[kind](line)) + "\n" for line in lines), encoding="utf-8"
    )


def write_model(directory, name: str) -> None:
    """Write a tiny random Llama with a tokenizer of ``MAKES``; it has rows for every token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    make_directory(name, directory)
    torch.manual_seed(3)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=640,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    ).save_pretrained(directory)


def losses(path, *keys: str) -> dict[str, float]:
    content = json.loads(path.read_text(encoding="utf-8"))
    for key in keys:
        content = content[key]
    return {depth: numbers["loss"] for depth, numbers in content.items()}


@pytest.mark.parametrize("name", thinned(ROWS, *EVERYDAY))
def test_losses_equal_those_of_the_run(name, tmp_path):
    kind, flags = ROWS[name]
    write_model(tmp_path / "m", name)
    write_lines(tmp_path / "d.jsonl", kind, LINES)
    done = run_command(
        "tools/prepare_data.py",
        "--input",
        "d.jsonl",
        "--output-prefix",
        "d",
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        "m",
        "--seq-length",
        64 if kind == "text" else LENGTH,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    done = run_command(
        "pretrain_sorted.py",
        "--load",
        "m",
        "--exit-layer-nums",
        1,
        2,
        "--seq-length",
        LENGTH,
        "--data-path",
        "d_text_document",
        "--split",
        "70,30",
        "--train-iters",
        1,
        "--micro-batch-size",
        2,
        "--full-validation",
        "--save",
        "run",
        "--save-hf",
        "hf",
        *flags,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    own = losses(tmp_path / "run" / "evaluation.json", "sets", "d")
    assert len(own) == 3
    arguments = ("--data-path", "d_text_document", "--split", "70,30", "--output", "out")
    done = run_command(
        "tools/evaluate.py", "run", "other=hf", *arguments, cwd=tmp_path
    )  # the run's own length and masks
    assert done.returncode == 0, done.stderr
    for model in ("run", "other"):
        assert losses(
            tmp_path / "out" / "evaluation.json", "data", "d", "models", model, "exits"
        ) == pytest.approx(own, abs=1e-4)
    if flags:
        done = run_command(
            "tools/evaluate.py", "hf", *arguments, "--seq-length", LENGTH, cwd=tmp_path
        )
        others = losses(tmp_path / "out" / "evaluation.json", "data", "d", "models", "hf", "exits")
        assert max(abs(others[depth] - own[depth]) for depth in own) > 1e-3, (
            "the flags made no difference, so this row shows nothing"
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a model, data of another tokenizer, and long questions.

    The questions are longer than the model's context.
    """
    path = tmp_path_factory.mktemp("prepared")
    write_model(path / "m", "byte_level")
    make_directory("prefix_on", path / "other")
    write_lines(path / "d.jsonl", "text", LINES)
    done = run_command(
        "tools/prepare_data.py",
        "--input",
        "d.jsonl",
        "--output-prefix",
        "d",
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        "other",
        cwd=path,
    )
    assert done.returncode == 0, done.stderr
    arguments = [{"question": f"{line} {line}?", "answer": line} for line in LINES[:6]]
    (path / "q.jsonl").write_text(
        "".join(json.dumps(question) + "\n" for question in arguments), encoding="utf-8"
    )
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("m", "--data-path", "d_text_document"),
            "d_text_document: prepared with tokenizer other/tokenizer.json",
        ),
        (("m", "--data-path", "none_text_document"), "none_text_document"),
        (
            ("m", "--split", "9,1", "--questions", "q.jsonl"),
            "--split: applies to prepared data. Give --data-path as well",
        ),
        (
            ("m", "--no-eod-mask-loss", "--questions", "q.jsonl"),
            "--eod-mask-loss: applies to prepared data",
        ),
        (
            ("m", "--data-path", "d_text_document", "--split", "x"),
            "--split: 'x' is not one to three shares",
        ),
    ],
)
def test_mistakes_are_one_line(folder, arguments, message):
    done = run_command("tools/evaluate.py", *arguments, cwd=folder)
    assert (
        done.returncode == 1
        and done.stderr.splitlines()[-1].startswith("error: ")
        and message in done.stderr
    ), done.stderr


def test_eight_models_have_a_table_and_truncated_prompts_are_reported_first(folder):
    models = [f"n{number}=m" for number in range(8)]
    done = run_command(
        "tools/evaluate.py",
        *models,
        "--depths",
        3,
        "--questions",
        "q.jsonl",
        "--shots",
        3,
        "--max-new-tokens",
        2,
        "--output",
        "eight",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "no picture: 8 models are more than the 6" in done.stdout
        and not (folder / "eight" / "evaluation.png").exists()
    )
    table = done.stdout[done.stdout.index("q: 6 questions") :]
    assert table.index("6 of 6 prompts of n7 were too long and lost their beginning") < table.index(
        "0.0%"
    )
    assert done.stdout.index(
        "n0, q: 6 of 6 prompts are longer than the 62 tokens"
    ) < done.stdout.index("q: 6 questions")
