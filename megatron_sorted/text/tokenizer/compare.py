"""Whether AutoTokenizer of transformers 5 reads a tokenizer.json as it is."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megatron_sorted.reading.json_text import parse_json
from megatron_sorted.text.tokenizer.classes import (
    ALWAYS_OF_TYPE,
    AS_WRITTEN,
    CLASSES,
    NEVER_OF_TYPE,
    build_pipeline,
    class_of,
)
from megatron_sorted.text.tokenizer.files import JSON, REMEDY, TokenizerFiles

if TYPE_CHECKING:
    import tokenizers

Encode = Callable[[list[str]], list[list[int]]]
"""A function from texts to the ids of each, without bos and eos."""
PROBES = (
    "",
    "a",
    " a",
    "a ",
    "  two  blanks  ",
    "\t",
    "\n",
    "\n\n\n",
    " \n ",
    "a\nb",
    "a\r\nb",
    "The dog\n\n  sat. It's 12 miles; 3.14 2026",
    "Größe naïve façade",
    "Gro\u0308ße nai\u0308ve",
    "漢字かな 한국어",
    "\U0001f600 \U0001f44d\U0001f3fd",
    "ﬁn ½ ① Ａ",
    "ALL Caps don't",
    "x         y",
    "<|nothing|> <b>",
    "\u2581a",
    "def f(x):\n\treturn x  # why?",
)
"""Texts that different readings of one file are known to split differently."""


def probes(names: list[str]) -> list[str]:
    """Return PROBES, and texts that contain the names of control and added tokens."""
    first = names[:8]
    return [
        *PROBES,
        *first,
        *(f"a {name} b" for name in first),
        *(f"{name}a\nb" for name in first),
        "".join(first),
    ]


def first_difference(one: Encode, other: Encode, texts: Sequence[str]) -> str | None:
    """Return the first text that two tokenizers split into different ids; None if there is none."""
    texts = list(texts)
    pairs = zip(texts, one(texts), other(texts), strict=True)
    return next((text for text, mine, theirs in pairs if mine != theirs), None)


def encoder_of(tokenizer: "tokenizers.Tokenizer") -> Encode:
    """Return the encoding function of a tokenizer of the library, without bos and eos."""
    return lambda texts: [
        encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ]


def rebuilding_class(files: TokenizerFiles, data: bytes) -> str | None:
    """Return the class with which AutoTokenizer rebuilds a tokenizer.json; None if it does not.

    AutoTokenizer ignores Llama's class for a byte-level file, and its own class for a model type
    where tokenizer_config.json has an ``auto_map`` for it.

    Args:
        files: The parsed files.
        data: The content of tokenizer.json.
    """
    name, model_type, auto_map = files.class_name, files.model_type, files.config.get("auto_map")
    if model_type in ALWAYS_OF_TYPE:
        has_map = isinstance(auto_map, list) or (
            isinstance(auto_map, dict) and "AutoTokenizer" in auto_map
        )
        return None if has_map and name in AS_WRITTEN else ALWAYS_OF_TYPE[model_type]
    class_name = class_of(name, model_type)
    if class_name is None or class_name in AS_WRITTEN or model_type in NEVER_OF_TYPE:
        return None
    return None if class_name == "LlamaTokenizer" and b'"ByteLevel"' in data else class_name


def rebuilt_difference(
    fast: "tokenizers.Tokenizer", files: TokenizerFiles, data: bytes
) -> tuple[str, str] | None:
    """Return the class that AutoTokenizer rebuilds and a text it splits differently, or None.

    Args:
        fast: The tokenizer of the file as it is, with the tokens that settings add.
        files: The parsed files.
        data: The content of tokenizer.json.
    """
    if files.main.name != JSON:
        return None
    if (name := rebuilding_class(files, data)) is None:
        return None
    names = [token.content for token in fast.get_added_tokens_decoder().values()]
    if name not in CLASSES:
        other = _by_transformers(files)
    elif (other := _by_class(name, fast, files, data)) is None:
        return None
    if other is None:
        return name, "texts"
    text = first_difference(encoder_of(fast), other, probes(names))
    return None if text is None else (name, repr(text))


def _by_class(
    name: str, fast: "tokenizers.Tokenizer", files: TokenizerFiles, data: bytes
) -> Encode | None:
    """Return the class's encoder; None if its steps are those of the file."""
    empty = build_pipeline(name, {}, [], files.config)
    mine, theirs = (parse_json(text, str(files.main), REMEDY) for text in (data, empty.to_str()))
    model, steps = mine["model"], ("normalizer", "pre_tokenizer")
    kinds = ("fuse_unk", "byte_fallback", "ignore_merges")
    if all(mine.get(step) == theirs.get(step) for step in steps) and all(
        bool(model.get(kind)) == bool(theirs["model"].get(kind)) for kind in kinds
    ):
        return None
    if not isinstance(model.get("vocab"), dict):
        return encoder_of(empty)
    merges = [
        tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair)
        for pair in model.get("merges", [])
    ]
    tokenizer = build_pipeline(name, model["vocab"], merges, files.config)
    tokenizer.add_tokens([token for _, token in sorted(fast.get_added_tokens_decoder().items())])
    return encoder_of(tokenizer)


def _by_transformers(files: TokenizerFiles) -> Encode | None:
    """Return AutoTokenizer's encoder, for classes that are unknown here; None if it has none."""
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            str(files.main.parent), local_files_only=True, trust_remote_code=False
        )
    except Exception:  # it raises errors of any class for directories that it cannot read
        return None
    return lambda texts: tokenizer(
        texts, add_special_tokens=False, truncation=False, padding=False
    )["input_ids"]
