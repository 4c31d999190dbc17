"""Tokenizers of the library ``tokenizers``, built from files and the tokens that settings add."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import read_bounded, read_json_object
from megatron_sorted.reading.shown import shown
from megatron_sorted.text.tokenizer.classes import CLASSES, build_pipeline, class_of
from megatron_sorted.text.tokenizer.files import (
    FLAGS,
    MERGES,
    REMEDY,
    VOCABULARY,
    AddedToken,
    TokenizerFiles,
    check_token_id,
)

if TYPE_CHECKING:
    import tokenizers


def read_with_library(files: TokenizerFiles, data: bytes) -> "tokenizers.Tokenizer":
    """Build the tokenizer of a tokenizer.json, or of vocab.json and merges.txt.

    Args:
        files: The parsed files.
        data: The content of tokenizer.json.

    Raises:
        DataError: They are damaged or contradict each other, or the library is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            "A Hugging Face tokenizer needs the package 'tokenizers'. pip install tokenizers."
        ) from error
    if files.main.name == VOCABULARY:
        fast = _byte_pairs(files)
    else:
        with _as_data_error(f"{files.main}: not a tokenizer"):
            fast = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    _add_tokens(fast, files)
    return fast


@contextmanager
def _as_data_error(what: str) -> Iterator[None]:
    """Re-raise every error of the library as `DataError`.

    The library raises bare Exception; its panics are not even that.
    """
    try:
        yield
    except (DataError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = shown(" ".join(str(error).split()), 200) or type(error).__name__
        raise DataError(f"{what} ({reason}). Give an intact directory.") from error


def _byte_pairs(files: TokenizerFiles) -> "tokenizers.Tokenizer":
    """Build the tokenizer of vocab.json and merges.txt by the rules of the named class."""
    name = class_of(files.class_name, files.model_type)
    directory = files.main.parent
    if name not in CLASSES:
        known = ", ".join(CLASSES)
        raise DataError(
            f"{directory}: {VOCABULARY} and {MERGES} do not define how texts are split, and the "
            f"class {name or 'of the tokenizer'} is unknown. Name one of {known} as "
            "tokenizer_class in tokenizer_config.json, or save the tokenizer as tokenizer.json "
            "with transformers."
        )
    vocabulary = read_json_object(files.main, REMEDY)
    if not all(type(i) is int and 0 <= i < 1 << 31 for i in vocabulary.values()):
        raise DataError(f"{files.main}: not {{token: id}}. Give an intact directory.")
    with _as_data_error(f"{directory}: {VOCABULARY} and {MERGES} are not a tokenizer"):
        lines = read_bounded(files.used[MERGES], REMEDY).decode("utf-8").split("\n")
        merges = [
            tuple(line.split())
            for line in map(str.strip, lines)
            if line and not line.startswith("#version")
        ]
        return build_pipeline(name, vocabulary, merges, files.config)


def _add_tokens(fast: "tokenizers.Tokenizer", files: TokenizerFiles) -> None:
    """Add the tokens that settings name, as transformers does: first those with ids, in order.

    Raises:
        DataError: One gets another id than the settings give.
    """
    special = {token.content for token in files.special}
    known = {token.content: token for token in fast.get_added_tokens_decoder().values()}
    for number, token in sorted(files.added.items()):
        added = _added_token(token, token.content in special)
        if token.content not in known or _state(known[token.content]) != _state(added):
            fast.add_tokens([added])
        check_token_id(files, number, fast.token_to_id(token.content), token)
        known[token.content] = added
    for token in files.special:
        if token.content not in known:
            fast.add_tokens([_added_token(token, True)])
            known[token.content] = token


def _added_token(token: AddedToken, is_special: bool) -> "tokenizers.AddedToken":
    from tokenizers import AddedToken

    flags: Mapping[str, Any] = {"normalized": not is_special, "special": is_special, **token.flags}
    return AddedToken(token.content, **{**flags, "special": flags["special"] or is_special})


def _state(token: "tokenizers.AddedToken") -> tuple:
    return tuple(getattr(token, name) for name in FLAGS)
