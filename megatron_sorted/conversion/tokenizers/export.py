"""Tokenizer files that go out with a model: AutoTokenizer reads them as the model was trained.

Where transformers reads a directory otherwise than this project (it rebuilds some classes, puts no
bos that tokenizer_config.json asks for, keeps dropout), the files are written anew so that nothing
is left to read otherwise: tokenizer.json says everything, and the class takes it as it stands.

A directory that holds a sentencepiece file alone gets a tokenizer.json: transformers and vLLM
rebuild such a file by rules of their own, and for tokenizers of other settings than LLaMA's the ids
are then others than those the model was trained with, and nothing says so.
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
from megatron_sorted.reading.json_text import read_settings
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
MODULE_TEXT = f'''"""A tokenizer.json read as it stands; only for readers that set trust_remote_code."""

from transformers import PreTrainedTokenizerFast


class {CLASS}(PreTrainedTokenizerFast):
    """Nothing but the file."""
'''
OF_THE_OLD_CLASS = (
    "auto_map",
    "sp_model_kwargs",
    "vocab_file",
    "tokenizer_file",
    "use_fast",
    "spaces_between_special_tokens",
)
"""Entries of a tokenizer_config.json that speak to the class it named before."""


def write_for_transformers(directory: Path) -> list[str]:
    """Make AutoTokenizer read a model's directory as we do, and return lines about what was done.

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
    """Write what ``tokenizer`` is as tokenizer.json and a tokenizer_config.json that fits."""
    config = read_settings(directory / CONFIG)
    kept: dict[str, Any] = {
        name: value for name, value in config.items() if name not in OF_THE_OLD_CLASS
    }
    kept |= tokenizer.special_tokens
    kept |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.adds_bos,
        "add_eos_token": tokenizer.adds_eos,
        MADE_OF: sorted(tokenizer.hashes),
    }
    model = read_settings(directory / "config.json")
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
    """Return a line about what was done for a directory with a sentencepiece file; None if there was nothing to do.

    It gets tokenizer.json and a tokenizer_config.json that fits, if the ids are those of our own
    reading; otherwise it stays as it is.
    """
    if not (directory / PIECES).is_file() or (directory / JSON).exists():
        return None
    try:
        text, config, line = _tokenizer_json(directory)
    except (ImportError, OSError, ValueError, DataError) as error:
        return (
            f"{PIECES} goes alone, without {JSON}: {str(error).rstrip('.')}. Transformers and vLLM "
            "may cut texts into other tokens; sentencepiece and our own tools read it as it is."
        )
    model = read_settings(directory / "config.json")
    if isinstance(model.get("max_position_embeddings"), int):
        config.setdefault("model_max_length", model["max_position_embeddings"])
    write_text_atomically(directory / JSON, text)
    write_settings(directory, config, model.get("model_type"))
    return line


def write_settings(directory: Path, config: Mapping[str, Any], model_type: str | None) -> None:
    """Write a tokenizer_config.json with which AutoTokenizer takes tokenizer.json as it stands.

    For models of type qwen2 AutoTokenizer of transformers 5 takes Qwen's class, whatever is named,
    and so cuts texts in another way; with an ``auto_map`` it does not. Without trust_remote_code
    nothing of the module that the map names is run, with it nothing but the file is read.
    """
    if model_type in ALWAYS_OF_TYPE:
        module = MODULE.removesuffix(".py")
        config = {**config, "auto_map": {"AutoTokenizer": [None, f"{module}.{CLASS}"]}}
        write_text_atomically(directory / MODULE, MODULE_TEXT)
    write_text_atomically(
        directory / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    )


def _tokenizer_json(directory: Path) -> tuple[str, dict[str, Any], str]:
    """Return the content of tokenizer.json and of tokenizer_config.json and a line about them.

    The settings that the directory has stay in force: special and added tokens, whether bos is
    added, chat template.

    Raises:
        ImportError: A library is not installed.
        DataError, ValueError: The directory holds no sentencepiece file, or contradicts itself, or
            the two would not read alike.
    """
    files = read_tokenizer_files(directory / PIECES)
    own = SentencePieceTokenizer(files)
    data = files.main.read_bytes()
    said = read_sentencepiece(data)
    if own.blank_before == "never":
        said = dataclasses.replace(said, adds_blank=False)
    fast = rebuild(said, data, own.blank_before)
    if isinstance(fast, str):
        raise ValueError(fast)
    config = {name: value for name, value in files.config.items() if name not in OF_THE_OLD_CLASS}
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
    count, ties = compare_tokenizers(said, own, fast)
    line = f"{JSON}: made of {PIECES}, the same ids and texts as sentencepiece on {count - ties:,} of {count:,} texts"
    if ties:
        line += f"; {ties} are cut into other pieces of the same score"
    return fast.to_str(), config, line


def _add_tokens(fast: "Tokenizer", files: TokenizerFiles, own: SentencePieceTokenizer) -> None:
    """Add the tokens that a text can name.

    Raises:
        ValueError: One gets another id.
    """
    from tokenizers import AddedToken

    flags = {token.content: token.flags for token in files.added.values()}
    for content, (number, is_special) in sorted(
        own.named_tokens.items(), key=lambda pair: pair[1][0]
    ):
        # a normalized name has a blank before it, which a text has not
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
    """Make the tokenizer put bos before a text and eos behind it where the configuration says so."""
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
