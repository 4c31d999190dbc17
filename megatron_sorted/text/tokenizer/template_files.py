"""The chat templates among a tokenizer's files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import read_bounded, read_optional_object
from megatron_sorted.reading.shown import shown

CONFIG, TEMPLATE, LEGACY_TEMPLATE = (
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
MORE_TEMPLATES = "additional_chat_templates"
MAX_TEMPLATE_BYTES = 1 << 20
MAX_TEMPLATES = 64
REMEDY = "Give an intact chat template."


def more_templates(directory: Path) -> list[Path]:
    """Return the files of further templates."""
    return sorted((directory / MORE_TEMPLATES).glob("*.jinja"))[:MAX_TEMPLATES]


def read_chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return {name: jinja text}; as in transformers, separate files replace the settings'.

    Args:
        directory: The directory of the tokenizer.
        config: The content of its tokenizer_config.json.

    Raises:
        DataError: A template is damaged or too large.
    """
    paths = {"default": directory / TEMPLATE}
    paths |= {path.stem: path for path in more_templates(directory)}
    templates = {name: _template_text(path) for name, path in paths.items() if path.is_file()}
    if templates:
        return templates
    for settings, name in (
        (config, CONFIG),
        (read_optional_object(directory / LEGACY_TEMPLATE), LEGACY_TEMPLATE),
    ):
        if value := settings.get("chat_template"):
            return _listed_templates(value, f"{directory / name}: chat_template")
    return {}


def _template_text(path: Path) -> str:
    try:
        return read_bounded(path, REMEDY, max_bytes=MAX_TEMPLATE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(path)}: not UTF-8 at byte {error.start}. {REMEDY}") from error


def _listed_templates(value: object, where: str) -> dict[str, str]:
    if isinstance(value, str):
        value = {"default": value}
    elif isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(value, dict) or not all(
        isinstance(part, str) for pair in value.items() for part in pair
    ):
        raise DataError(f"{where}: neither a text nor a list of named texts. {REMEDY}")
    for name, text in value.items():
        if len(text) > MAX_TEMPLATE_BYTES:
            raise DataError(
                f"{where}: {name!r:.40} has {len(text):,} characters, but at most "
                f"{MAX_TEMPLATE_BYTES:,} are read. {REMEDY}"
            )
    return value
