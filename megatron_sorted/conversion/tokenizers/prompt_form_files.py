"""What a model directory says of its prompt form: the form itself, a chat template for transformers, and every token that ends a text."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sorted.checkpoint.layout import HUGGING_FACE, TOKENIZER
from megatron_sorted.conversion.open_model import OpenModel
from megatron_sorted.reading.json_text import read_settings
from megatron_sorted.text.prompt_form import (
    CHAT,
    FILE,
    PromptForm,
    check_rows,
    check_tokens,
    end_tokens,
    form_from_bytes,
)
from megatron_sorted.text.tokenizer.template_files import CONFIG as SETTINGS
from megatron_sorted.text.tokenizer.template_files import LEGACY_TEMPLATE, MORE_TEMPLATES, TEMPLATE

GENERATION = "generation_config.json"


def form_of(model: OpenModel) -> PromptForm | None:
    """Return the form that came with a model; None where none did.

    Raises:
        DataError: It is damaged, or neither its tokenizer nor its network can write the form's tokens.
    """
    path = model.files.get(f"{TOKENIZER}/{FILE}")
    if path is None:
        return None
    form, tokenizer = form_from_bytes(path.read_bytes(), str(path)), model.open_tokenizer()
    check_rows(form, model.settings.vocab_size, str(model.directory))
    if tokenizer is not None:
        check_tokens(form, tokenizer, str(path))
    return form


def trained_ends(model: OpenModel, form: PromptForm | None) -> tuple[int, ...]:
    """Return the tokens that end a text: those that the model came with, then those it was trained with.

    Raises:
        DataError: What it came with are no tokens of it.
    """
    rows = model.settings.vocab_size
    path = model.files.get(
        f"{HUGGING_FACE}/{GENERATION}", model.files.get(f"{TOKENIZER}/{GENERATION}")
    )
    said = read_settings(path) if path is not None else {}
    found = [
        *end_tokens(said.get("eos_token_id"), f"{path}", rows),
        *end_tokens(
            (model.config or {}).get("eos_token_id"), f"{model.directory}: config.json", rows
        ),
    ]
    return tuple(dict.fromkeys([*found, *(form.end_ids if form else ())]))


def write_form(directory: Path, form: PromptForm) -> list[str]:
    """Write a form into a directory: by itself, and as the chat template that transformers takes.

    It takes the place of any template that was not trained.

    Args:
        directory: With the tokenizer's files.
        form: To write.

    Returns:
        A line about it, if there is something to say.
    """
    (directory / FILE).write_text(form.as_json(), encoding="utf-8")
    if not form.is_conversation or (
        form.name == CHAT and _own_template(directory) == form.template
    ):
        return []
    others = [
        *(directory / MORE_TEMPLATES).glob("*.jinja"),
        directory / LEGACY_TEMPLATE,
        directory / TEMPLATE,
    ]
    replaces = any(path.is_file() for path in others)
    for path in others:
        path.unlink(missing_ok=True)
    if (directory / MORE_TEMPLATES).is_dir():
        (directory / MORE_TEMPLATES).rmdir()
    if (settings := read_settings(directory / SETTINGS)).pop("chat_template", None) is not None:
        replaces = True
        _write_object(directory / SETTINGS, settings)
    (directory / TEMPLATE).write_text(form.template, encoding="utf-8")
    instead = (
        " in place of the tokenizer's own, which was not trained"
        if replaces and form.name != CHAT
        else ""
    )
    return [f"{TEMPLATE}: the {form.label} form, as trained{instead}"]


def _own_template(directory: Path) -> str | None:
    """Return the template that transformers takes from a directory if it has one template alone."""
    if (directory / MORE_TEMPLATES).is_dir():
        return None
    if (directory / TEMPLATE).is_file():
        return (directory / TEMPLATE).read_text(encoding="utf-8")
    return read_settings(directory / SETTINGS).get("chat_template")


def write_generation_config(
    directory: Path, config: Mapping[str, Any], ends: tuple[int, ...]
) -> None:
    """Write generation_config.json: what stands there stays, and every token that ends a text is added.

    Raises:
        DataError: What stands there is no JSON object.
    """
    path = directory / GENERATION
    said = read_settings(path) or {
        name: config[name]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if config.get(name) is not None
    }
    if ends:
        said["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
    _write_object(path, said)


def _write_object(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
