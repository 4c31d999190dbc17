"""The files of a tokenizer, bounded in size and parsed; nothing in them is executed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import read_optional_object
from megatron_sorted.text.tokenizer.template_files import (
    CONFIG,
    LEGACY_TEMPLATE,
    TEMPLATE,
    more_templates,
    read_chat_templates,
)

JSON, PIECES, VOCABULARY, MERGES = "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
SETTINGS_FILES = (CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, TEMPLATE, LEGACY_TEMPLATE)
NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
ID = re.compile(r"[0-9]{1,18}")
"""An id as files write it, of at most 18 digits; "²" is not one."""
REMEDY = "Give an intact directory."
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclass(frozen=True)
class AddedToken:
    """A token that files add to a vocabulary, or name.

    Attributes:
        content: The token's text.
        flags: The values that the files give of lstrip, rstrip, single_word, normalized and
            special.
    """

    content: str
    flags: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizerFiles:
    """The content of the files of one tokenizer.

    Attributes:
        place: The directory, or the sentencepiece file that was named.
        main: The file with the vocabulary: tokenizer.json, a sentencepiece file or vocab.json.
        used: Every file that was read, by name within the directory.
        config: The object in tokenizer_config.json; empty where there is none.
        model_type: The model type in config.json beside it; None where there is none.
        added: {id: token} of added_tokens_decoder, or of added_tokens.json.
        named: {"bos_token": token, ...} as the files name them.
        extra: Further special tokens, without an id of their own.
        chat_templates: {name: jinja text}.
        notes: Lines about contradictions.
    """

    place: Path
    main: Path
    used: dict[str, Path]
    config: dict[str, Any]
    model_type: str | None
    added: dict[int, AddedToken]
    named: dict[str, AddedToken]
    extra: tuple[AddedToken, ...]
    chat_templates: dict[str, str]
    notes: tuple[str, ...]

    @property
    def special(self) -> tuple[AddedToken, ...]:
        """Return the special tokens that files name, those with a name of their own first."""
        return (*self.named.values(), *self.extra)

    @property
    def class_name(self) -> str | None:
        """Return the tokenizer class that the files name, without "Fast"; None if there is none."""
        name = self.config.get("tokenizer_class")
        return name.removesuffix("Fast") if isinstance(name, str) and name else None


def find_tokenizer(path: Path) -> Path | None:
    """Return the file that holds a tokenizer's vocabulary; None if there is none.

    A sentencepiece file that is named itself is used; in a directory, tokenizer.json comes first.
    """
    if path.is_file() and path.name not in (JSON, VOCABULARY, MERGES, *SETTINGS_FILES):
        return path
    directory = path if path.is_dir() else path.parent
    for name in (JSON, PIECES):
        if (directory / name).is_file():
            return directory / name
    both = (directory / VOCABULARY).is_file() and (directory / MERGES).is_file()
    return directory / VOCABULARY if both else None


def files_with(main: Path) -> dict[str, Path]:
    """Return every file that a tokenizer is read from, by name within its directory.

    Args:
        main: The file with its vocabulary, listed by its own name.
    """
    directory = main.parent
    names = [*SETTINGS_FILES, *([MERGES] if main.name == VOCABULARY else [])]
    beside = {name: directory / name for name in names if (directory / name).is_file()}
    return {
        main.name: main,
        **beside,
        **{path.relative_to(directory).as_posix(): path for path in more_templates(directory)},
    }


def read_tokenizer_files(path: Path) -> TokenizerFiles:
    """Read the files of a tokenizer.

    Args:
        path: A directory, or a sentencepiece file with settings beside it.

    Raises:
        DataError: There is no tokenizer, or a file is damaged or too large.
    """
    main = find_tokenizer(path)
    if main is None:
        raise DataError(
            f"{path}: no tokenizer ({JSON}, {PIECES}, or {VOCABULARY} with {MERGES}). Give a "
            "directory or a sentencepiece file that exists."
        )
    directory = main.parent
    config = read_optional_object(directory / CONFIG)
    notes: list[str] = []
    added = _added_tokens(directory, config)
    older = read_optional_object(directory / SPECIAL_TOKENS)
    named = _named_tokens(directory, config, older, notes)
    extra = _extra_tokens(directory, config, older)
    model_type = read_optional_object(directory / "config.json").get("model_type")
    return TokenizerFiles(
        path,
        main,
        files_with(main),
        config,
        model_type if isinstance(model_type, str) else None,
        added,
        named,
        extra,
        read_chat_templates(directory, config),
        tuple(notes),
    )


def _token(value: object, where: str) -> AddedToken:
    if isinstance(value, str) and value:
        return AddedToken(value)
    if isinstance(value, dict) and isinstance(value.get("content"), str) and value["content"]:
        return AddedToken(
            value["content"], {name: bool(value[name]) for name in FLAGS if name in value}
        )
    raise DataError(f"{where}: {value!r:.80} is not a token. Give an intact directory.")


def _added_tokens(directory: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Return {id: token} of tokenizer_config.json, or else of added_tokens.json."""
    where = f"{directory / CONFIG}: added_tokens_decoder"
    tokens = config.get("added_tokens_decoder") or {}
    if not isinstance(tokens, dict):
        raise DataError(f"{where}: not an object. Give an intact directory.")
    pairs = list(tokens.items())
    if not pairs:
        path = directory / ADDED_TOKENS
        where, pairs = (
            str(path),
            [(number, name) for name, number in read_optional_object(path).items()],
        )
    tokens_by_id = {}
    for number, token in pairs:
        token_id = int(number) if ID.fullmatch(str(number)) else -1
        if token_id < 0:
            raise DataError(f"{where}: {number!r:.40} is not an id. Give an intact directory.")
        tokens_by_id[token_id] = _token(token, where)
    return tokens_by_id


def _named_tokens(
    directory: Path, config: Mapping[str, Any], older: Mapping[str, Any], notes: list[str]
) -> dict[str, AddedToken]:
    """Return the special tokens by name.

    As in transformers, special_tokens_map.json replaces entries of a tokenizer_config.json that has
    no added_tokens_decoder.
    """
    named = _named(config, f"{directory / CONFIG}")
    overrides = not config.get("added_tokens_decoder")
    for name, token in _named(older, f"{directory / SPECIAL_TOKENS}").items():
        if name in named and named[name].content != token.content:
            used = token if overrides else named[name]
            notes.append(
                f"{directory.name}: {name} is {named[name].content!r} in {CONFIG}, "
                f"{token.content!r} in {SPECIAL_TOKENS}; {used.content!r} is used, as "
                "transformers does"
            )
        if overrides or name not in named:
            named[name] = token
    return named


def _named(settings: Mapping[str, Any], where: str) -> dict[str, AddedToken]:
    further = settings.get("extra_special_tokens")
    entries = {**(further if isinstance(further, dict) else {}), **settings}
    return {
        name: _token(value, f"{where}: {name}")
        for name, value in entries.items()
        if value
        and (name in NAMED_TOKENS or (name.endswith("_token") and isinstance(value, str | dict)))
    }


def _extra_tokens(
    directory: Path, config: Mapping[str, Any], older: Mapping[str, Any]
) -> tuple[AddedToken, ...]:
    extra: dict[str, AddedToken] = {}
    for settings, name in ((config, CONFIG), (older, SPECIAL_TOKENS)):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            listed = settings.get(key)
            for value in listed if isinstance(listed, list) else ():
                token = _token(value, f"{directory / name}: {key}")
                extra.setdefault(token.content, token)
    return tuple(extra.values())


def check_token_id(
    files: TokenizerFiles, number: int | None, place: int, token: AddedToken
) -> None:
    """Check that an added token has the id that the settings give.

    Raises:
        DataError: It does not: its id would mean another token in other readers.
    """
    if number not in (None, place):
        raise DataError(
            f"{files.main.parent}: {token.content!r} should be token {number}, but the vocabulary "
            f"of {files.main.name} and the tokens before it make it {place}. Give a directory "
            "whose files belong together."
        )
