"""Prompt template, end tokens and sampling defaults of a finished model."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from megatron_sorted.conversion.tokenizers.prompt_form_files import (
    write_form,
    write_generation_config,
)
from megatron_sorted.errors import DataError
from megatron_sorted.exported.generation_defaults import generation_defaults_of
from megatron_sorted.text.conversation import chat_form
from megatron_sorted.text.prompt_form import FILE, ControlToken, form_from_bytes
from megatron_sorted.text.tokenizer.opening import open_tokenizer
from megatron_sorted.text.written_forms import text_form, written_form
from tests.support.chat_templates import CHATML, INST, write_fast_tokenizer

MODEL = SimpleNamespace(
    config=SimpleNamespace(vocab_size=400), generation_config=SimpleNamespace(eos_token_id=7)
)


def written(directory, **files):
    """Write JSON files into a directory with a tokenizer; return the tokenizer."""
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return open_tokenizer(write_fast_tokenizer(directory, CHATML))


def test_the_stored_template_is_used_and_can_be_overridden(tmp_path):
    tokenizer = written(
        tmp_path, config={"eos_token_id": 2}, generation_config={"eos_token_id": [3, 9]}
    )
    form = chat_form(tokenizer, None)[0]
    (tmp_path / FILE).write_text(form.as_json())
    form = generation_defaults_of(tmp_path, tokenizer)
    assert (
        form.is_stored
        and form.prompt_form.template == CHATML
        and form.line == "prompt form: chat, as trained"
    )
    assert form.end_ids_of(MODEL, tokenizer) == {
        2,
        3,
        4,
        9,
    }  # the files', <|im_end|> as trained, </s>
    other = generation_defaults_of(tmp_path, tokenizer, "alpaca")
    assert (
        not other.is_stored
        and "### Response" in other.prompt_form.template
        and "trained in chat" in other.line
    )
    assert other.end_ids_of(MODEL, tokenizer) == {2, 3, 4, 9}


def test_models_without_a_stored_template_use_the_tokenizers_own(tmp_path):
    tokenizer = written(tmp_path, config={"eos_token_id": None})
    form = generation_defaults_of(tmp_path, tokenizer)
    assert (
        not form.is_stored
        and form.prompt_form.template == CHATML
        and "has no prompt form (it was made by" in form.line
    )
    assert form.end_ids_of(MODEL, tokenizer) == {
        2
    }  # what transformers makes up for a silent config.json is no end token
    tokenizer.chat_templates = {}
    assert generation_defaults_of(tmp_path, tokenizer).prompt_form is None
    (tmp_path / FILE).write_text(text_form(tokenizer, True).as_json())
    form = generation_defaults_of(tmp_path, tokenizer)
    assert form.prompt_form.name == "text" and "trained on text, not on conversations" in form.line


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}),
        (
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1},
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1},
        ),
        ({"do_sample": True, "top_k": 0}, {"temperature": 1.0, "top_k": None}),
    ],
)
def test_sampling_defaults(tmp_path, generation, expected):
    tokenizer = written(tmp_path, generation_config=generation)
    assert generation_defaults_of(tmp_path, tokenizer).sampling_defaults() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda form: dataclasses.replace(form, ends=(ControlToken("<|im_end|>", 9),)),
            r"end token '<\|im_end\|>' was trained as id 9, but .* 4",
        ),
        (
            lambda form: dataclasses.replace(form, ends=(ControlToken("<|removed|>", 9),)),
            r"end token '<\|removed\|>' was trained as id 9",
        ),
        (
            lambda form: dataclasses.replace(form, begin=ControlToken("<s>", 5)),
            r"first token '<s>' was trained as id 5, but .* 1\.",
        ),
    ],
)
def test_a_template_of_another_tokenizer_is_refused(tmp_path, change, message):
    tokenizer = written(tmp_path)
    (tmp_path / FILE).write_text(change(chat_form(tokenizer, None)[0]).as_json())
    with pytest.raises(DataError, match=message):
        generation_defaults_of(tmp_path, tokenizer)


@pytest.mark.parametrize("eos", [-1, 400, 1 << 40, "</s>", [2, None], 2.0, True])
def test_invalid_end_tokens_are_refused(tmp_path, eos):
    tokenizer = written(
        tmp_path, config={"eos_token_id": 2}, generation_config={"eos_token_id": eos}
    )
    with pytest.raises(
        DataError,
        match=r"generation_config.json: eos_token_id .* is not one of the model's 0\.\.399",
    ):
        generation_defaults_of(tmp_path, tokenizer).end_ids_of(MODEL, tokenizer)


def test_end_tokens_must_be_in_the_vocabulary(tmp_path):
    tokenizer = written(tmp_path)
    (tmp_path / FILE).write_text(chat_form(tokenizer, None)[0].as_json())
    with pytest.raises(
        DataError, match=r"'<\|im_end\|>', id 4, but the model has 4 tokens, so it can never stop"
    ):
        generation_defaults_of(tmp_path, tokenizer).check_rows(4)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"3", b'{"format": 2}', b"[" * 100_000, b'{"format": 1, "name": "x"}']
)
def test_damaged_templates_are_refused(content):
    with pytest.raises(DataError, match=r"here: (not .*prompt form|not JSON|its lists .* deep)"):
        form_from_bytes(content, "here")


def test_an_export_replaces_templates_that_were_not_trained(tmp_path):
    tokenizer = written(tmp_path, generation_config={"eos_token_id": 1, "temperature": 0.6})
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(INST)
    form = written_form("alpaca", tokenizer, True, True)
    (note,) = write_form(tmp_path, form)
    write_generation_config(tmp_path, {}, (1, 2))
    assert (
        open_tokenizer(tmp_path).chat_templates == {"default": form.template}
        and "in place of the tokenizer's own" in note
    )
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "eos_token_id": [1, 2],
        "temperature": 0.6,
    }
    own = open_tokenizer(write_fast_tokenizer(tmp_path / "own", CHATML))
    assert write_form(tmp_path / "own", chat_form(own, None)[0]) == []
    assert not (tmp_path / "own" / "chat_template.jinja").exists()  # it is there already
