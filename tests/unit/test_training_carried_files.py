"""The small files in a run's checkpoints, and where they come from."""

import dataclasses
import hashlib

import pytest

from megatron_sorted.checkpoint.candidates import Candidate
from megatron_sorted.errors import CheckpointError
from megatron_sorted.settings.run import Settings
from megatron_sorted.text.prompt_form import ControlToken, PromptForm, form_from_bytes
from megatron_sorted.training.run.carried_files import (
    FORM,
    carry_files,
    files_of_checkpoint,
    tokenizer_files,
)

NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "qwen.tiktoken",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "additional_chat_templates/tools.jinja",
)


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    for name in (*NAMES, "config.json", "model.safetensors", "README.md", "notes.txt"):
        (tmp_path / name).write_text(f"this is {name}")
    return tmp_path


def test_every_file_of_a_tokenizer_is_known_and_nothing_else(directory):
    expected = {f"tokenizer/{name}": f"this is {name}".encode() for name in NAMES}
    assert (
        tokenizer_files(
            Settings(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(directory))
        )
        == expected
    )
    by_file = Settings(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(directory / "tokenizer.json")
    )
    assert tokenizer_files(by_file) == expected
    sentencepiece = Settings(tokenizer_model=str(directory / "tokenizer.model"))
    settings = [
        f"tokenizer/{name}"
        for name in (
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "chat_template.jinja",
            "chat_template.json",
            "additional_chat_templates/tools.jinja",
        )
    ]
    assert tokenizer_files(sentencepiece) == {
        name: expected[name] for name in ("tokenizer/tokenizer.model", *settings)
    }
    assert tokenizer_files(Settings()) == {}
    # an exported directory is searched for tokenizer.model
    (directory / "mine.model").write_text("mine")
    files = tokenizer_files(Settings(tokenizer_model=str(directory / "mine.model")))
    assert files["tokenizer/tokenizer.model"] == b"mine" and "tokenizer/mine.model" not in files


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    candidate = Candidate(tmp_path, {"files": {"tokenizer/missing.json": {}, "__0_0.distcp": {}}})
    with pytest.raises(
        CheckpointError, match=r"tokenizer/missing.json: not readable \(No such file or directory\)"
    ):
        files_of_checkpoint(candidate)


def test_only_tokenizer_and_hugging_face_files_are_carried(tmp_path):
    for name in ("tokenizer", "huggingface"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.json").write_text(name)
    candidate = Candidate(
        tmp_path,
        {
            "files": {
                "tokenizer/a.json": {},
                "huggingface/a.json": {},
                "common.pt": {},
                "__0_0.distcp": {},
            }
        },
    )
    assert files_of_checkpoint(candidate) == {
        "tokenizer/a.json": b"tokenizer",
        "huggingface/a.json": b"huggingface",
    }


CARRIED = {
    "huggingface/config.json": b"{}",
    "tokenizer/tokenizer.json": b"words",
    "tokenizer/chat_template.jinja": b"chat",
}
TOKENIZER = {
    "type": "HuggingFaceTokenizer",
    "name": "x",
    "sha256": hashlib.sha256(b"words").hexdigest(),
}


def test_a_run_without_a_tokenizer_carries_everything():
    assert carry_files(CARRIED, {}, TOKENIZER) == CARRIED == carry_files(CARRIED, {}, None)


def test_another_tokenizer_replaces_the_one_before_but_not_the_hugging_face_files():
    own = {"tokenizer/tokenizer.model": b"other words"}
    for saved in (TOKENIZER, None):
        assert carry_files(CARRIED, own, saved) == {"huggingface/config.json": b"{}", **own}


def test_the_same_tokenizer_named_by_one_file_keeps_what_belongs_to_it():
    own = {"tokenizer/my_words.json": b"words"}
    assert carry_files(CARRIED, own, TOKENIZER) == {
        "huggingface/config.json": b"{}",
        "tokenizer/chat_template.jinja": b"chat",
        "tokenizer/my_words.json": b"words",
    }
    changed = {"tokenizer/tokenizer.json": b"words", "tokenizer/chat_template.jinja": b"my chat"}
    assert carry_files(CARRIED, changed, TOKENIZER) == {"huggingface/config.json": b"{}", **changed}


def test_a_sentencepiece_file_keeps_its_fast_tokenizer():
    carried = {
        "tokenizer/tokenizer.json": b"fast",
        "tokenizer/tokenizer.model": b"pieces",
        "tokenizer/chat_template.jinja": b"chat",
    }
    saved = {
        "type": "HuggingFaceTokenizer",
        "name": "x/tokenizer.json",
        "sha256": hashlib.sha256(b"fast").hexdigest(),
        "sentencepiece_sha256": hashlib.sha256(b"pieces").hexdigest(),
    }
    own = {"tokenizer/my.model": b"pieces"}
    assert carry_files(carried, own, saved) == {
        "tokenizer/tokenizer.json": b"fast",
        "tokenizer/chat_template.jinja": b"chat",
        **own,
    }


def test_the_form_of_the_data_replaces_the_one_before_and_text_only_adds_its_end():
    chat = PromptForm("chat", "t", {}, None, (ControlToken("<|im_end|>", 4),))
    plain, text = (
        dataclasses.replace(chat, name="plain"),
        dataclasses.replace(chat, name="text", ends=(ControlToken("</s>", 2),)),
    )
    carried = {**CARRIED, FORM: chat.as_json().encode()}
    for files in (
        {},
        {"tokenizer/tokenizer.json": b"words"},
    ):  # a run that reads no tokenizer, and one that reads the same
        kept = carry_files(carried, files | {FORM: plain.as_json().encode()}, TOKENIZER)
        assert kept == {**carried, FORM: plain.as_json().encode()}
        assert carry_files(carried, files, TOKENIZER) == carried
        form = form_from_bytes(
            carry_files(carried, files | {FORM: text.as_json().encode()}, TOKENIZER)[FORM], ""
        )
        assert form.name == "chat" and form.end_ids == (4, 2)
    assert FORM not in carry_files(
        carried, {"tokenizer/tokenizer.model": b"other words"}, TOKENIZER
    )
