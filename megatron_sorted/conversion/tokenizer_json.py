"""A ``tokenizer.json`` for a directory that holds a sentencepiece file alone.

Transformers and vLLM rebuild such a file by rules of their own: for tokenizers of other settings
than LLaMA's the ids are then others than those the model was trained with, and nothing says so.
What is written here is taken by them as it is.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sorted.conversion.fast_tokenizer import rebuild
from megatron_sorted.conversion.sentencepiece_file import read_sentencepiece
from megatron_sorted.conversion.tokenizer_check import compare_tokenizers
from megatron_sorted.errors import DataError
from megatron_sorted.files import write_text_atomically
from megatron_sorted.text.tokenizer_classes import ALWAYS_OF_TYPE
from megatron_sorted.text.tokenizer_files import (
    FLAGS,
    TokenizerFiles,
    read_object,
    read_tokenizer_files,
)
from megatron_sorted.text.tokenizer_pieces import SentencePieceTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FAST, SLOW, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
MODULE, CLASS = "tokenizer_as_written.py", "TokenizerAsWritten"
MODULE_TEXT = f'''"""A tokenizer.json read as it stands; only for readers that set trust_remote_code."""

from transformers import PreTrainedTokenizerFast


class {CLASS}(PreTrainedTokenizerFast):
    """Nothing but the file."""
'''
OF_THE_OLD_CLASS = (
    "auto_map", "sp_model_kwargs", "vocab_file", "tokenizer_file", "use_fast",
    "spaces_between_special_tokens")
"""Entries of a tokenizer_config.json that speak to the class it named before."""


def add_fast_tokenizer(directory: Path) -> str | None:
    """Return a line about what was done for a directory with a sentencepiece file; None if there was nothing to do.

    It gets tokenizer.json and a tokenizer_config.json that fits, if the ids are those of our own
    reading; otherwise it stays as it is.
    """
    if not (directory / SLOW).is_file() or (directory / FAST).exists():
        return None
    try:
        made = make_tokenizer_json(directory)
    except (ImportError, OSError, ValueError, DataError) as error:
        made = str(error)
    if isinstance(made, str):
        return (f"{SLOW} goes alone, without {FAST}: {made.rstrip('.')}. Transformers and vLLM may cut texts into other tokens; "
                "sentencepiece and our own tools read it as it is.")
    text, config, line = made
    model = read_object(directory / "config.json")
    if isinstance(model.get("max_position_embeddings"), int):
        config.setdefault("model_max_length", model["max_position_embeddings"])
    write_text_atomically(directory / FAST, text)
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
    write_text_atomically(directory / SETTINGS, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def make_tokenizer_json(directory: Path) -> tuple[str, dict[str, Any], str] | str:
    """Return the content of tokenizer.json and of tokenizer_config.json and a line about them; or, why there is none.

    The settings that the directory has stay in force: special and added tokens, whether bos is
    added, chat template.

    Raises:
        ImportError: A library is not installed.
        DataError, ValueError: The directory holds no sentencepiece file, or contradicts itself.
    """
    files = read_tokenizer_files(directory / SLOW)
    own = SentencePieceTokenizer(files)
    data = files.main.read_bytes()
    said = read_sentencepiece(data)
    if own.blank_before == "never":
        said = dataclasses.replace(said, adds_blank=False)
    fast = rebuild(said, data, own.blank_before)
    if isinstance(fast, str):
        return fast
    config = {name: value for name, value in files.config.items() if name not in OF_THE_OLD_CLASS}
    if (problem := _add_tokens(fast, files, own)) is not None:
        return problem
    config |= {**own.special_tokens, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
               "add_bos_token": own.adds_bos, "add_eos_token": own.adds_eos}
    if files.added:
        added = fast.get_added_tokens_decoder()
        config["added_tokens_decoder"] = {str(i): {"content": added[i].content, **{name: getattr(added[i], name) for name in FLAGS}}
                                          for i in sorted(files.added)}
    add_ends(fast, config)
    num_texts: list[int] = []
    if (problem := compare_tokenizers(said, own, fast, num_texts)) is not None:
        return problem
    count, ties = num_texts
    line = f"{FAST}: made of {SLOW}, the same ids and texts as sentencepiece on {count - ties:,} of {count:,} texts"
    if ties:
        line += f"; {ties} are cut into other pieces of the same score"
    return fast.to_str(), config, line


def _add_tokens(fast: "Tokenizer", files: TokenizerFiles, own: SentencePieceTokenizer) -> str | None:
    """Add the tokens that a text can name, and return why that cannot be, or None."""
    from tokenizers import AddedToken

    flags = {token.content: token.flags for token in files.added.values()}
    for content, (number, is_special) in sorted(own.named_tokens.items(), key=lambda pair: pair[1][0]):
        # a normalized name has a blank before it, which a text has not
        fast.add_tokens([AddedToken(content, **{**flags.get(content, {}), "special": is_special, "normalized": False})])
        if fast.token_to_id(content) != number:
            return f"{content!r} is to be token {number}, but the file and the tokens before it end at {fast.get_vocab_size() - 1}"
    return None


def add_ends(fast: "Tokenizer", config: Mapping[str, Any]) -> None:
    """Make the tokenizer put bos before a text and eos behind it where the configuration says so."""
    from tokenizers import processors

    ends = {name: config[f"{name}_token"] for name in ("bos", "eos") if config[f"add_{name}_token"]}
    one, other = (([f"{ends['bos']}:{part}"] if "bos" in ends else []) + [f"${letter}:{part}"] + (
        [f"{ends['eos']}:{part}"] if "eos" in ends else []) for part, letter in ((0, "A"), (1, "B")))
    fast.post_processor = processors.TemplateProcessing(
        single=one, pair=one + other, special_tokens=[(token, fast.token_to_id(token)) for token in sorted(set(ends.values()))])
