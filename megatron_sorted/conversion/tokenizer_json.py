"""A ``tokenizer.json`` for a directory that holds a sentencepiece file alone.

Transformers and vLLM rebuild such a file by rules of their own: for tokenizers of other settings than LLaMA's the ids are then others
than those the model was trained with, and nothing says so. What is written here is taken by them as it is.

The names of control pieces in a text (``</s>``) stand for these pieces, as everywhere in transformers; sentencepiece takes them as text.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sorted.conversion.fast_tokenizer import rebuild
from megatron_sorted.conversion.sentencepiece_file import CONTROL, UNKNOWN, SentencePieceFile, read_sentencepiece
from megatron_sorted.conversion.tokenizer_check import compare_tokenizers
from megatron_sorted.files import write_text_atomically

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

FLAGS = ("special", "lstrip", "rstrip", "single_word")
FAST, SLOW, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
NOT_BY_AUTO = ("; for models of type qwen2 AutoTokenizer of transformers 5 takes Qwen's class instead: "
               "read it with PreTrainedTokenizerFast.from_pretrained")
OF_THE_OLD_CLASS = (
    "auto_map", "legacy", "sp_model_kwargs", "vocab_file", "tokenizer_file", "use_fast", "add_prefix_space",
    "spaces_between_special_tokens")
"""Entries of a tokenizer_config.json that speak to the class it named before."""


def add_fast_tokenizer(directory: Path) -> str | None:
    """Returns a line about what was done for a directory with a sentencepiece file; None if there was nothing to do.

    It gets tokenizer.json and a tokenizer_config.json that fits, if the ids are sentencepiece's own; otherwise it stays as it is.
    """
    if not (directory / SLOW).is_file() or (directory / FAST).exists():
        return None
    try:
        config = _read_object(directory / SETTINGS)
        made = make_tokenizer_json((directory / SLOW).read_bytes(), config, _read_object(directory / "added_tokens.json"))
        model = _read_object(directory / "config.json")
    except (ImportError, OSError, ValueError) as error:
        made = str(error)
    if isinstance(made, str):
        return (f"{SLOW} goes alone, without {FAST}: {made.rstrip('.')}. Transformers and vLLM may cut texts into other tokens; "
                "sentencepiece and our own tools read it as it is.")
    text, config, line = made
    if isinstance(model.get("max_position_embeddings"), int):
        config.setdefault("model_max_length", model["max_position_embeddings"])
    write_text_atomically(directory / FAST, text)
    write_text_atomically(directory / SETTINGS, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    # transformers 5 ignores the class a directory of this type names, and cuts texts as Qwen's own tokenizer does
    return line + (NOT_BY_AUTO if model.get("model_type") == "qwen2" else "")


def make_tokenizer_json(data: bytes, config: Mapping[str, Any], more_tokens: Mapping[str, int]) -> tuple[str, dict[str, Any], str] | str:
    """Returns the content of tokenizer.json and of tokenizer_config.json and a line about them; or, why there is none.

    Args:
        data: A sentencepiece file.
        config: The tokenizer_config.json it has, which stays in force: special tokens, whether bos is added, chat template.
        more_tokens: The added_tokens.json it has: ids of further tokens.

    Raises:
        ImportError: A library is not installed.
        ValueError: It is no sentencepiece file.
    """
    from sentencepiece import SentencePieceProcessor

    said = read_sentencepiece(data)
    try:
        own = SentencePieceProcessor(model_proto=data)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"not a sentencepiece model ({error})") from error
    fast = rebuild(said, data)
    if isinstance(fast, str):
        return fast
    config = {name: value for name, value in config.items() if name not in OF_THE_OLD_CLASS}
    if (problem := _add_tokens(fast, said, config, more_tokens)) is not None:
        return problem
    config = _fitting_config(config, own)
    if (problem := _add_ends(fast, config)) is not None:
        return problem
    num_texts: list[int] = []
    if (problem := compare_tokenizers(said, own, fast, num_texts)) is not None:
        return problem
    count, ties = num_texts
    line = f"{FAST}: made of {SLOW}, the same ids and texts as sentencepiece on {count - ties:,} of {count:,} texts"
    if ties:
        line += f"; {ties} are cut into other pieces of the same score"
    return fast.to_str(), config, line


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not an object")
    return value


def _add_tokens(fast: "Tokenizer", said: SentencePieceFile, config: dict[str, Any], more_tokens: Mapping[str, int]) -> str | None:
    """Adds control pieces and the tokens that a configuration adds; returns why that cannot be, or None."""
    from tokenizers import AddedToken

    tokens = {i: {"content": piece.text, "special": True} for i, piece in enumerate(said.pieces) if piece.kind in (CONTROL, UNKNOWN)}
    tokens |= {int(number): {"content": content, "special": True} for content, number in more_tokens.items()}
    added = config.get("added_tokens_decoder") or {}
    for number, token in added.items():
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            return f"{SETTINGS} says nothing of token {number}"
        tokens[int(number)] = {"content": token["content"], **{name: bool(token.get(name)) for name in FLAGS}}
    for number, token in sorted(tokens.items()):
        token["normalized"] = False  # a normalized name has a blank before it, which a text has not
        fast.add_tokens([AddedToken(**token)])
        if fast.token_to_id(token["content"]) != number:
            return f"{token['content']!r} is to be token {number}, but the file and the tokens before it end at {fast.get_vocab_size() - 1}"
    if added:
        config["added_tokens_decoder"] = {number: tokens[int(number)] for number in added}
    return None


def _fitting_config(config: Mapping[str, Any], own: "SentencePieceProcessor") -> dict[str, Any]:
    """Returns a tokenizer_config.json for a fast tokenizer: what is given stands, the rest is sentencepiece's own."""
    ids = {"bos_token": own.bos_id(), "eos_token": own.eos_id(), "unk_token": own.unk_id(), "pad_token": own.pad_id()}
    words = {name: own.id_to_piece(number) for name, number in ids.items() if number >= 0}
    words |= {name: _content(config[name]) for name in ids if config.get(name)}
    adds_bos, adds_eos = config.get("add_bos_token", "bos_token" in words), config.get("add_eos_token", False)
    return {**config, **words, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "add_bos_token": bool(adds_bos and "bos_token" in words), "add_eos_token": bool(adds_eos and "eos_token" in words)}


def _content(token: object) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _add_ends(fast: "Tokenizer", config: Mapping[str, Any]) -> str | None:
    """Makes the tokenizer put bos before a text and eos behind it where the configuration says so; returns why it cannot, or None."""
    from tokenizers import processors

    ends = {name: config[f"{name}_token"] for name in ("bos", "eos") if config[f"add_{name}_token"]}
    if unknown := [token for token in ends.values() if fast.token_to_id(token) is None]:
        return f"{SETTINGS} names {unknown[0]!r}, which is no token"
    if not ends:
        return None
    one, other = (([f"{ends['bos']}:{part}"] if "bos" in ends else []) + [f"${letter}:{part}"] + (
        [f"{ends['eos']}:{part}"] if "eos" in ends else []) for part, letter in ((0, "A"), (1, "B")))
    fast.post_processor = processors.TemplateProcessing(
        single=one, pair=one + other, special_tokens=[(token, fast.token_to_id(token)) for token in sorted(set(ends.values()))])
    return None
