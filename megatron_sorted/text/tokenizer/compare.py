"""Whether AutoTokenizer of transformers 5 reads a tokenizer.json as it stands."""

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
"""Texts to the ids of each, without bos and eos."""
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
"""Texts in which readings of one file are known to differ."""


def probes(names: list[str]) -> list[str]:
    """Return PROBES, and texts that hold the names of control and added tokens."""
    some = names[:8]
    return [
        *PROBES,
        *some,
        *(f"a {name} b" for name in some),
        *(f"{name}a\nb" for name in some),
        "".join(some),
    ]


def first_difference(one: Encode, other: Encode, texts: Sequence[str]) -> str | None:
    """Return the first text that two tokenizers cut into different ids; None if there is none."""
    texts = list(texts)
    pairs = zip(texts, one(texts), other(texts), strict=True)
    return next((text for text, mine, theirs in pairs if mine != theirs), None)


def encoder_of(tokenizer: "tokenizers.Tokenizer") -> Encode:
    """Return what encodes by a tokenizer of the library, without bos and eos."""
    return lambda texts: [
        found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ]


def rebuilding_class(files: TokenizerFiles, data: bytes) -> str | None:
    """Return the class with which AutoTokenizer rebuilds a tokenizer.json; None where it does not.

    AutoTokenizer passes over Llama's class for a file that cuts bytes, and over its own for a type
    of model where tokenizer_config.json has an ``auto_map`` for it.

    Args:
        files: What the files say.
        data: The content of tokenizer.json.
    """
    name, model_type, mapped = files.class_name, files.model_type, files.config.get("auto_map")
    if model_type in ALWAYS_OF_TYPE:
        has_map = isinstance(mapped, list) or (
            isinstance(mapped, dict) and "AutoTokenizer" in mapped
        )
        return None if has_map and name in AS_WRITTEN else ALWAYS_OF_TYPE[model_type]
    found = class_of(name, model_type)
    if found is None or found in AS_WRITTEN or model_type in NEVER_OF_TYPE:
        return None
    return None if found == "LlamaTokenizer" and b'"ByteLevel"' in data else found


def rebuilt_difference(
    fast: "tokenizers.Tokenizer", files: TokenizerFiles, data: bytes
) -> tuple[str, str] | None:
    """Return the class that AutoTokenizer rebuilds and a text it cuts otherwise, or None.

    Args:
        fast: The file as it stands, with the tokens that settings add.
        files: What the files say.
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
    """Return the class's encoder; None where its steps are the file's, which is quickly seen."""
    empty = build_pipeline(name, {}, [], files.config)
    mine, theirs = (parse_json(one, str(files.main), REMEDY) for one in (data, empty.to_str()))
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
    made = build_pipeline(name, model["vocab"], merges, files.config)
    made.add_tokens([token for _, token in sorted(fast.get_added_tokens_decoder().items())])
    return encoder_of(made)


def _by_transformers(files: TokenizerFiles) -> Encode | None:
    """Return AutoTokenizer's encoder, for classes that are unknown here; None if it has none."""
    try:
        from transformers import AutoTokenizer

        made = AutoTokenizer.from_pretrained(
            str(files.main.parent), local_files_only=True, trust_remote_code=False
        )
    except Exception:  # it raises what it likes for directories that it cannot read
        return None
    return lambda texts: made(texts, add_special_tokens=False, truncation=False, padding=False)[
        "input_ids"
    ]
