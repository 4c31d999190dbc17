"""From `messages` to a model that answers them in transformers, `generate` and `serve`.

Prompts have the tokens of training, and answers end by themselves.
"""

import json
import signal
import subprocess
from pathlib import Path

import pytest

from megatron_sorted.data.indexed import open_indexed
from megatron_sorted.text.prompt_form import read_form
from tests.support.chat_models import ANSWERS, done, write_model, write_talks, write_tokenizer
from tests.support.chat_templates import CHATML, HEADERS, INST, THINKS, as_written
from tests.support.commands import start_command
from tests.support.ports import free_port, until_it_answers

LONGEST = 40
FAMILIES, KINDS, FORMS = (
    ("llama", "mistral", "qwen2", "qwen3"),
    ("sentencepiece", "tokenizer.json", "both"),
    ("own", "none", "alpaca"),
)
OWN = {("llama", "tokenizer.json"): "headers", ("qwen2", ""): "chatml", ("qwen3", ""): "thinks"}
TEMPLATES = {"inst": INST, "headers": HEADERS, "chatml": CHATML, "thinks": THINKS}
# every pair of family, kind of tokenizer and form; the other rows are marked long
ROWS = [
    pytest.param(
        family,
        kind,
        form,
        id=f"{family}-{kind}-{form}",
        marks=[] if (f + k - t) % 3 == 0 else [pytest.mark.long],
    )
    for f, family in enumerate(FAMILIES)
    for k, kind in enumerate(KINDS)
    for t, form in enumerate(FORMS)
]


def own_template(family: str, kind: str) -> str:
    """Return the chat template of a family's tokenizer."""
    return OWN.get((family, kind), OWN.get((family, ""), "inst"))


def trained(prefix: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Return the ids of prompts and of answers, in order."""
    data = open_indexed(str(prefix))
    ids = [data.document(number).tolist() for number in range(data.num_documents)]
    masks = [data.trained(number).tolist() for number in range(data.num_documents)]
    begins = [mask.index(True) for mask in masks]
    return (
        [one[:begin] for one, begin in zip(ids, begins, strict=True)],
        [
            [token for token, is_answer in zip(one, mask, strict=True) if is_answer]
            for one, mask in zip(ids, masks, strict=True)
        ],
    )


def of_transformers(directory: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts and answers of an exported model in plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, prompts, texts = AutoModelForCausalLM.from_pretrained(directory), [], []
    for question in ANSWERS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        with torch.inference_mode():
            text = model.generate(torch.tensor([ids]), max_new_tokens=LONGEST, do_sample=False)[
                0, len(ids) :
            ].tolist()
        prompts.append(ids)
        texts.append(text)
    return prompts, texts


def of_server(cwd: Path) -> list[dict]:
    """Return the server's answer to every question."""
    port = free_port()
    with (
        open(cwd / "serve.log", "w") as log,
        start_command(
            "tools/serve.py", "hf", "--port", port, cwd=cwd, stdout=log, stderr=subprocess.STDOUT
        ) as server,
    ):
        try:
            bodies = [
                json.dumps(
                    {
                        "messages": [{"role": "user", "content": question}],
                        "temperature": 0,
                        "max_tokens": LONGEST,
                    }
                )
                for question in ANSWERS
            ]
            return [
                until_it_answers(server, port, "/v1/chat/completions", body.encode(), seconds=240)
                for body in bodies
            ]
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(60)
            finally:
                server.kill()


@pytest.mark.parametrize(("family", "kind", "form"), ROWS)
def test_answers_as_trained_and_stops_by_itself(tmp_path, family, kind, form):
    own = own_template(family, kind)
    write_tokenizer(tmp_path / "m", kind, None if form == "none" else TEMPLATES[own])
    write_model(tmp_path / "m", family)
    write_talks(tmp_path / "d.jsonl")
    more = ("--prompt-template", "alpaca") if form == "alpaca" else ()
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
        *more,
        cwd=tmp_path,
    )
    ran = done(
        "pretrain_sorted.py",
        "--load",
        "m",
        "--exit-layer-nums",
        2,
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
        "--train-iters",
        60,
        "--lr",
        5e-3,
        "--lr-decay-style",
        "constant",
        "--log-interval",
        60,
        "--save",
        "run",
        "--save-hf",
        "hf",
        cwd=tmp_path,
    )
    label = {"own": "chat", "none": "plain", "alpaca": "alpaca"}[form]
    assert f"prompt form: {label}; answers end with" in ran.stdout
    assert (
        read_form(tmp_path / "hf").as_dict()
        == json.loads((tmp_path / "d.json").read_text())["prompt_form"]
    )

    prompts, answers = trained(tmp_path / "d_text_document")
    used_prompts, written = of_transformers(tmp_path / "hf")
    assert used_prompts == prompts and written == answers
    texts = [
        as_written(own, {"content": answer})
        .removesuffix("<|im_end|>")
        .removesuffix("<|eot_id|>")
        .removesuffix("</s>")
        .strip()
        if form == "own"
        else answer
        for answer in ANSWERS.values()
    ]
    shown = done(
        "tools/generate.py",
        "hf",
        *(word for question in ANSWERS for word in ("--prompt", question)),
        "--strategy",
        "full",
        "--prompt-template",
        label,
        "--max-new-tokens",
        LONGEST,
        cwd=tmp_path,
    ).stdout
    answers_by_prompt = dict(zip(ANSWERS, [""] * len(ANSWERS), strict=True))
    for part in shown.split("--- prompt ")[1:]:
        head, _, text = part.partition("\n")
        answers_by_prompt[list(ANSWERS)[int(head.split(":")[0])]] = text.strip()
    assert list(answers_by_prompt.values()) == texts
    for reply, prompt, text, ids in zip(of_server(tmp_path), prompts, texts, answers, strict=True):
        assert (
            reply["choices"][0]["message"]["content"].strip() == text
            and reply["choices"][0]["finish_reason"] == "stop"
        )
        assert reply["usage"]["prompt_tokens"] == len(prompt) and reply["usage"][
            "completion_tokens"
        ] == len(ids)
