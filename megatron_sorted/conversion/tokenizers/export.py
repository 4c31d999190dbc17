"""Tokenizer files for export, which AutoTokenizer reads as the model was trained.

transformers reads some directories differently from this project: it rebuilds some classes, adds no
bos that tokenizer_config.json asks for, keeps dropout. Such files are written anew: tokenizer.json
holds everything, and the class takes it unchanged.

A directory with a sentencepiece file alone gets a tokenizer.json: transformers and vLLM convert
such a file by rules of their own, and for tokenizers with other options than LLaMA's the ids then
differ silently from those the model was trained with.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sorted.conversion.tokenizers.check import compare_tokenizers
from megatron_sorted.conversion.tokenizers.fast_tokenizer import rebuild
from megatron_sorted.conversion.tokenizers.sentencepiece_file import read_sentencepiece
from megatron_sorted.errors import CheckpointError, DataError
from megatron_sorted.files import write_text_atomically
from megatron_sorted.reading.json_text import read_optional_object
from megatron_sorted.text.tokenizer.classes import ALWAYS_OF_TYPE
from megatron_sorted.text.tokenizer.fast import MADE_OF, HuggingFaceTokenizer
from megatron_sorted.text.tokenizer.files import (
    CONFIG,
    FLAGS,
    JSON,
    PIECES,
    TokenizerFiles,
    find_tokenizer,
    read_tokenizer_files,
)
from megatron_sorted.text.tokenizer.opening import open_tokenizer
from megatron_sorted.text.tokenizer.pieces import SentencePieceTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MODULE, CLASS = "tokenizer_as_written.py", "TokenizerAsWritten"
MODULE_TEXT = f'''"""A tokenizer.json read unchanged; used only with trust_remote_code."""

from transformers import PreTrainedTokenizerFast


class {CLASS}(PreTrainedTokenizerFast):
    """Nothing but the file."""
'''
OLD_CLASS_KEYS = (
    "auto_map",
    "sp_model_kwargs",
    "vocab_file",
    "tokenizer_file",
    "use_fast",
    "spaces_between_special_tokens",
)
"""Keys of a tokenizer_config.json that are arguments of the class it named before."""


def write_for_transformers(directory: Path) -> list[str]:
    """Change a directory so that AutoTokenizer reads it as we do; return lines about the changes.

    Raises:
        DataError: The tokenizer in the directory cannot be read.
    """
    lines = [line for line in (add_fast_tokenizer(directory),) if line is not None]
    if find_tokenizer(directory) is None:
        return lines
    tokenizer = open_tokenizer(directory, None)
    if isinstance(tokenizer, HuggingFaceTokenizer) and (
        tokenizer.differs_from_auto or JSON not in tokenizer.files
    ):
        lines += tokenizer.notes
        lines.append(_write_anew(directory, tokenizer))
    return lines


def _write_anew(directory: Path, tokenizer: HuggingFaceTokenizer) -> str:
    """Write ``tokenizer`` as tokenizer.json with a matching tokenizer_config.json."""
    config = read_optional_object(directory / CONFIG)
    kept: dict[str, Any] = {
        name: value for name, value in config.items() if name not in OLD_CLASS_KEYS
    }
    kept |= tokenizer.special_tokens
    kept |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.adds_bos,
        "add_eos_token": tokenizer.adds_eos,
        MADE_OF: sorted(tokenizer.hashes),
    }
    model = read_optional_object(directory / "config.json")
    add_ends(tokenizer.fast, kept)
    write_text_atomically(directory / JSON, tokenizer.fast.to_str())
    write_settings(directory, kept, model.get("model_type"))
    _check_alike(directory, tokenizer)
    return f"{JSON} is written anew, so that AutoTokenizer reads it as the model was trained"


def _check_alike(directory: Path, tokenizer: HuggingFaceTokenizer) -> None:
    again = open_tokenizer(directory, None)
    if again.notes and getattr(again, "differs_from_auto", False):
        raise CheckpointError(
            f"{directory}: {again.notes[0]}, also after it was written anew. "
            "Please report this directory."
        )
    assert again.vocab_size == tokenizer.vocab_size and again.adds_bos == tokenizer.adds_bos


def add_fast_tokenizer(directory: Path) -> str | None:
    """Add tokenizer.json beside a sentencepiece file; return a line about it, None without changes.

    The directory gets tokenizer.json and a matching tokenizer_config.json if they give the same ids
    as sentencepiece; otherwise nothing is written.
    """
    if not (directory / PIECES).is_file() or (directory / JSON).exists():
        return None
    try:
        text, config, line = _tokenizer_json(directory)
    except (ImportError, OSError, ValueError, DataError) as error:
        return (
            f"{PIECES} is exported without {JSON}: {str(error).rstrip('.')}. transformers and vLLM "
            "may split texts into other tokens; sentencepiece and our own tools read it unchanged."
        )
    model = read_optional_object(directory / "config.json")
    if isinstance(model.get("max_position_embeddings"), int):
        config.setdefault("model_max_length", model["max_position_embeddings"])
    write_text_atomically(directory / JSON, text)
    write_settings(directory, config, model.get("model_type"))
    return line


def write_settings(directory: Path, config: Mapping[str, Any], model_type: str | None) -> None:
    """Write a tokenizer_config.json with which AutoTokenizer takes tokenizer.json unchanged.

    For models of type qwen2, AutoTokenizer of transformers 5 takes Qwen's class, whatever is named,
    and splits texts differently; with an ``auto_map`` it does not. Without trust_remote_code
    the module that the map names is not run; with it, it reads nothing but the file.
    """
    if model_type in ALWAYS_OF_TYPE:
        module = MODULE.removesuffix(".py")
        config = {**config, "auto_map": {"AutoTokenizer": [None, f"{module}.{CLASS}"]}}
        write_text_atomically(directory / MODULE, MODULE_TEXT)
    write_text_atomically(
        directory / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    )


def _tokenizer_json(directory: Path) -> tuple[str, dict[str, Any], str]:
    """Return the contents of tokenizer.json and tokenizer_config.json, and a line about them.

    Special and added tokens, the addition of bos, and the chat template of the directory are kept.

    Raises:
        ImportError: A library is not installed.
        DataError, ValueError: The directory holds no sentencepiece file, contradicts itself, or the
            two tokenizers differ.
    """
    files = read_tokenizer_files(directory / PIECES)
    own = SentencePieceTokenizer(files)
    data = files.main.read_bytes()
    content = read_sentencepiece(data)
    if own.space_before == "never":
        content = dataclasses.replace(content, adds_blank=False)
    fast = rebuild(content, data, own.space_before)
    config = {name: value for name, value in files.config.items() if name not in OLD_CLASS_KEYS}
    _add_tokens(fast, files, own)
    config |= {
        **own.special_tokens,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": own.adds_bos,
        "add_eos_token": own.adds_eos,
    }
    if files.added:
        added = fast.get_added_tokens_decoder()
        config["added_tokens_decoder"] = {
            str(i): {
                "content": added[i].content,
                **{name: getattr(added[i], name) for name in FLAGS},
            }
            for i in sorted(files.added)
        }
    add_ends(fast, config)
    count, ties = compare_tokenizers(content, own, fast)
    line = (
        f"{JSON}: built from {PIECES}, the same ids and texts as sentencepiece on "
        f"{count - ties:,} of {count:,} texts"
    )
    if ties:
        line += f"; {ties} are split into other pieces of the same score"
    return fast.to_str(), config, line


def _add_tokens(fast: "Tokenizer", files: TokenizerFiles, own: SentencePieceTokenizer) -> None:
    """Add the tokens that texts can contain by name.

    Raises:
        ValueError: A token gets another id than it had.
    """
    from tokenizers import AddedToken

    flags = {token.content: token.flags for token in files.added.values()}
    for content, (number, is_special) in sorted(
        own.named_tokens.items(), key=lambda pair: pair[1][0]
    ):
        # Normalization would put a blank before the name, which texts do not have.
        fast.add_tokens(
            [
                AddedToken(
                    content,
                    **{**flags.get(content, {}), "special": is_special, "normalized": False},
                )
            ]
        )
        if fast.token_to_id(content) != number:
            raise ValueError(
                f"{content!r} is to be token {number}, but the file and the tokens before it "
                f"end at {fast.get_vocab_size() - 1}"
            )


def add_ends(fast: "Tokenizer", config: Mapping[str, Any]) -> None:
    """Make the tokenizer add bos before and eos after a text if the configuration asks for it."""
    from tokenizers import processors

    ends = {name: config[f"{name}_token"] for name in ("bos", "eos") if config[f"add_{name}_token"]}
    one, other = (
        ([f"{ends['bos']}:{part}"] if "bos" in ends else [])
        + [f"${letter}:{part}"]
        + ([f"{ends['eos']}:{part}"] if "eos" in ends else [])
        for part, letter in ((0, "A"), (1, "B"))
    )
    fast.post_processor = processors.TemplateProcessing(
        single=one,
        pair=one + other,
        special_tokens=[(token, fast.token_to_id(token)) for token in sorted(set(ends.values()))],
    )
