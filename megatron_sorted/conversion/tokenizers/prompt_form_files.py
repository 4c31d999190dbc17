"""Files of a model directory that define its prompt template and the tokens that end a text."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sorted.checkpoint.layout import HUGGING_FACE, TOKENIZER
from megatron_sorted.conversion.hugging_face.families import GENERATION_FILE
from megatron_sorted.conversion.open_model import OpenModel
from megatron_sorted.reading.json_text import read_optional_object
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


def form_of(model: OpenModel) -> PromptForm | None:
    """Return the prompt template that came with a model; None if there is none.

    Raises:
        DataError: The template is damaged, or the tokenizer or the network lacks its tokens.
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
    """Return the tokens that end a text: those of the model's files, then those of the template.

    Raises:
        DataError: An entry of the files is no token of the model.
    """
    rows = model.settings.vocab_size
    path = model.files.get(
        f"{HUGGING_FACE}/{GENERATION_FILE}", model.files.get(f"{TOKENIZER}/{GENERATION_FILE}")
    )
    generation = read_optional_object(path) if path is not None else {}
    own = [
        *end_tokens(generation.get("eos_token_id"), f"{path}", rows),
        *end_tokens(
            (model.config or {}).get("eos_token_id"), f"{model.directory}: config.json", rows
        ),
    ]
    return tuple(dict.fromkeys([*own, *(form.end_ids if form else ())]))


def write_form(directory: Path, form: PromptForm) -> list[str]:
    """Write a prompt template as a file of its own and as a chat template for transformers.

    It replaces all templates that the model was not trained with.

    Args:
        directory: The directory of the tokenizer's files.
        form: The prompt template.

    Returns:
        A line about it, if anything changed.
    """
    (directory / FILE).write_text(form.as_json(), encoding="utf-8")
    is_same = _own_template(directory) == form.template
    if not form.is_conversation or (form.name == CHAT and is_same):
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
    if (settings := read_optional_object(directory / SETTINGS)).pop(
        "chat_template", None
    ) is not None:
        replaces = True
        _write_object(directory / SETTINGS, settings)
    (directory / TEMPLATE).write_text(form.template, encoding="utf-8")
    instead = (
        " in place of the tokenizer's own, which was not trained"
        if replaces and form.name != CHAT and not is_same
        else ""
    )
    return [f"{TEMPLATE}: the {form.label} form, as trained{instead}"]


def _own_template(directory: Path) -> str | None:
    """Return the only chat template of a directory; None if there are several or none."""
    if (directory / MORE_TEMPLATES).is_dir():
        return None
    if (directory / TEMPLATE).is_file():
        return (directory / TEMPLATE).read_text(encoding="utf-8")
    return read_optional_object(directory / SETTINGS).get("chat_template")


def write_generation_config(
    directory: Path, config: Mapping[str, Any], ends: tuple[int, ...]
) -> None:
    """Write generation_config.json: keep its entries and add every token that ends a text.

    Raises:
        DataError: The existing file is no JSON object.
    """
    path = directory / GENERATION_FILE
    generation = read_optional_object(path) or {
        name: config[name]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if config.get(name) is not None
    }
    if ends:
        generation["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
    _write_object(path, generation)


def _write_object(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
