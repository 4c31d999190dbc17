"""The prompt form is stored with a model by every command.

Models of 0.6.0 have none, and a line reports it.
"""

import json
import shutil
from pathlib import Path

import pytest

from megatron_sorted.text.prompt_form import FILE, read_form
from tests.support.chat_models import ANSWERS, done, write_model, write_talks, write_tokenizer
from tests.support.chat_templates import CHATML

STORED = "prompt form: chat, as trained"
NONE = "has no prompt form (it was made by megatron_sorted 0.6.0 or before, or by another tool)"
TRAIN = (
    "--load",
    "m",
    "--seq-length",
    128,
    "--data-path",
    "d_text_document",
    "--split",
    1,
    "--micro-batch-size",
    4,
    "--global-batch-size",
    4,
    "--lr",
    5e-3,
    "--lr-decay-style",
    "constant",
    "--log-interval",
    60,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with a model ``hf`` that answers in ChatML, its run, and questions.

    The model has two exits.
    """
    place = tmp_path_factory.mktemp("stored_form")
    write_tokenizer(place / "m", "tokenizer.json", CHATML)
    write_model(place / "m", "llama")
    write_talks(place / "d.jsonl")
    done(
        "tools/prepare_data.py",
        "--input",
        "d.jsonl",
        "--output-prefix",
        "d",
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        "m",
        cwd=place,
    )
    done(
        "pretrain_sorted.py",
        *TRAIN,
        "--exit-layer-nums",
        1,
        2,
        "--train-iters",
        60,
        "--save",
        "run",
        "--save-hf",
        "hf",
        cwd=place,
    )
    questions = [
        {"question_id": number, "category": "qa", "turns": [question]}
        for number, question in enumerate(ANSWERS)
    ]
    (place / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    return place


def answers(place: Path, model: str, *more: object) -> tuple[dict[str, str], str]:
    """Return the answers of a model to every question, and what generate prints beside."""
    shown = done(
        "tools/generate.py",
        model,
        *(word for question in ANSWERS for word in ("--prompt", question)),
        "--max-new-tokens",
        20,
        *more,
        cwd=place,
    )
    parts = shown.stdout.split("--- prompt ")[1:]
    texts = {int(part.split(":")[0]): part.partition("\n")[2].strip() for part in parts}
    return {question: texts[number] for number, question in enumerate(ANSWERS)}, shown.stderr


def ends_of(directory: Path) -> list[int]:
    """Return the end tokens in generation_config.json."""
    ids = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    return ids if isinstance(ids, list) else [ids]


def template_of(directory: Path) -> str:
    """Return the template that plain transformers reads."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory).chat_template


def test_a_sub_model_is_prompted_as_the_whole_one_was_trained(folder):
    done("tools/extract_submodel.py", "hf", "sub", "--depth", 1, cwd=folder)
    assert read_form(folder / "sub").as_dict() == read_form(folder / "hf").as_dict() and ends_of(
        folder / "sub"
    ) == ends_of(folder / "hf")
    assert template_of(folder / "sub") == template_of(folder / "hf") == CHATML
    replies, printed = answers(folder, "sub", "--prompt-template", "chat")
    assert replies == ANSWERS and STORED in printed


def test_an_adapter_for_peft_brings_the_form_it_was_trained_in(folder):
    done(
        "pretrain_sorted.py",
        *TRAIN,
        "--exit-layer-nums",
        1,
        2,
        "--lora-rank",
        2,
        "--train-iters",
        1,
        "--save",
        "tuned",
        cwd=folder,
    )
    done("tools/convert.py", "export-adapter", "tuned", "adapter", "--base-model", "m", cwd=folder)
    assert read_form(folder / "adapter").as_dict() == read_form(folder / "hf").as_dict()
    assert template_of(folder / "adapter") == CHATML and ends_of(folder / "adapter") == ends_of(
        folder / "hf"
    )


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        (
            "tools/tune_decoding.py",
            ("--num-prompts", 2, "--max-new-tokens", 8, "--output", "choices.json"),
        ),
        (
            "tools/benchmark_decoding.py",
            (
                "--per-group",
                2,
                "--strategies",
                "full",
                "--without-transformers",
                "--max-new-tokens",
                8,
                "--output",
                "benchmark",
            ),
        ),
    ],
)
def test_tuning_and_the_benchmark_use_the_stored_form(folder, tool, arguments):
    shown = done(tool, "hf", "--questions", "questions.jsonl", *arguments, cwd=folder)
    assert STORED in shown.stdout + shown.stderr
    other = done(
        tool,
        "hf",
        "--questions",
        "questions.jsonl",
        "--prompt-template",
        "plain",
        *arguments,
        cwd=folder,
    )
    assert (
        "trained in chat" in other.stdout + other.stderr
        and STORED not in other.stdout + other.stderr
    )


def test_sampling_defaults_of_a_directory_apply_unless_options_override_them(folder):
    shutil.copytree(folder / "hf", folder / "sampled")
    path = folder / "sampled" / "generation_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"do_sample": True, "temperature": 100.0})
    )
    greedy, _ = answers(
        folder, "sampled", "--prompt-template", "chat", "--generation-config", "none"
    )
    sampled, _ = answers(folder, "sampled", "--prompt-template", "chat", "--seed", 1)
    assert greedy == ANSWERS and sampled != ANSWERS
    assert answers(folder, "sampled", "--prompt-template", "chat", "--temperature", 0)[0] == ANSWERS


def test_exports_checkpoints_and_data_of_0_6_have_no_form_and_a_line_reports_it(folder):
    shutil.copytree(folder / "hf", folder / "old")
    (folder / "old" / FILE).unlink()
    assert (
        answers(folder, "old", "--prompt-template", "chat")[0] == ANSWERS
    )  # the tokenizer's own template, as before
    shown = done("tools/generate.py", "old", "--chat", cwd=folder, text="say hi\n\n")
    assert f"old {NONE}" in shown.stderr and "hi there" in shown.stdout

    summary = json.loads((folder / "d.json").read_text())
    assert summary.pop("prompt_form")["name"] == "chat"
    for name in ("d_text_document.bin", "d_text_document.idx"):
        shutil.copy(folder / name, folder / name.replace("d_", "old_", 1))
    (folder / "old.json").write_text(json.dumps(summary))
    ran = done(
        "pretrain_sorted.py",
        *TRAIN,
        "--data-path",
        "old_text_document",
        "--exit-layer-nums",
        1,
        2,
        "--train-iters",
        1,
        "--save",
        "old_run",
        "--save-hf",
        "old_hf",
        cwd=folder,
    )
    assert NONE in ran.stdout and not (folder / "old_hf" / FILE).exists()
    assert not list((folder / "old_run").rglob(FILE))
