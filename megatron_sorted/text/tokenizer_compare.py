"""Whether AutoTokenizer of transformers 5 reads a tokenizer.json as it stands."""

from typing import TYPE_CHECKING, Any

from megatron_sorted.reading.json_text import parse_json
from megatron_sorted.text.tokenizer_classes import (
    AS_WRITTEN,
    CLASSES,
    build_pipeline,
    rebuilding_class,
)
from megatron_sorted.text.tokenizer_files import JSON, REMEDY, TokenizerFiles

if TYPE_CHECKING:
    import tokenizers

    from megatron_sorted.text.tokenizer import Tokenizer

PROBES = (
    "", "a", " a", "a ", "  two  blanks  ", "\t", "\n", "\n\n\n", " \n ", "a\nb", "a\r\nb",
    "The dog\n\n  sat. It's 12 miles; 3.14 2026", "Größe naïve façade", "Gro\u0308ße nai\u0308ve",
    "漢字かな 한국어", "\U0001f600 \U0001f44d\U0001f3fd", "ﬁn ½ ① Ａ", "ALL Caps don't", "x         y",
    "<|nothing|> <b>", "\u2581a", "def f(x):\n\treturn x  # why?")
"""Texts in which readings of one file are known to differ."""


def probes(names: list[str]) -> list[str]:
    """Return PROBES, and texts that hold the names of control and added tokens."""
    some = names[:8]
    return [*PROBES, *some, *(f"a {name} b" for name in some), *(f"{name}a\nb" for name in some),
            "".join(some)]


def first_difference(
    one: "Tokenizer | tokenizers.Tokenizer", other: "Tokenizer | tokenizers.Tokenizer",
    texts: list[str],
) -> str | None:
    """Return the first text whose ids differ; None if there is none."""
    for text, mine, theirs in zip(texts, _ids(one, texts), _ids(other, texts), strict=True):
        if mine != theirs:
            return text
    return None


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if hasattr(tokenizer, "encode_batch_fast"):
        return [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=False)]
    if hasattr(tokenizer, "encode_rendered"):
        return tokenizer.encode_batch(texts)
    return tokenizer(
        texts, add_special_tokens=False, truncation=False, padding=False)["input_ids"]


def rebuilding_class_of(files: TokenizerFiles, data: bytes) -> str | None:
    """Return the class with which AutoTokenizer rebuilds a directory; None where it does not."""
    mapped = files.config.get("auto_map")
    has_map = isinstance(mapped, list) or (isinstance(mapped, dict) and "AutoTokenizer" in mapped)
    return rebuilding_class(files.class_name, files.model_type, b'"ByteLevel"' in data, has_map)


def rebuilt_difference(
    fast: "tokenizers.Tokenizer", files: TokenizerFiles, data: bytes,
) -> tuple[str, str] | None:
    """Return the class that AutoTokenizer rebuilds and a text it cuts otherwise, or None.

    Args:
        fast: The file as it stands, with the tokens that settings add.
        files: What the files say.
        data: The content of tokenizer.json.
    """
    if files.main.name != JSON:
        return None
    name = rebuilding_class_of(files, data)
    if name is None or name in AS_WRITTEN:
        return None
    names = [token.content for token in fast.get_added_tokens_decoder().values()]
    if name not in CLASSES:
        other = _by_transformers(files)
    elif (other := _by_class(name, fast, files, data)) is None:
        return None
    if other is None:
        return name, "texts"
    text = first_difference(fast, other, probes(names))
    return None if text is None else (name, repr(text))


def _by_class(
    name: str, fast: "tokenizers.Tokenizer", files: TokenizerFiles, data: bytes,
) -> "tokenizers.Tokenizer | None":
    """Return the class's tokenizer; None where its steps are the file's, which is quickly seen."""
    empty = build_pipeline(name, {}, [], files.config)
    mine, theirs = (parse_json(one, str(files.main), REMEDY) for one in (data, empty.to_str()))
    model, steps = mine["model"], ("normalizer", "pre_tokenizer")
    kinds = ("fuse_unk", "byte_fallback", "ignore_merges")
    if all(mine.get(step) == theirs.get(step) for step in steps) and all(
            bool(model.get(kind)) == bool(theirs["model"].get(kind)) for kind in kinds):
        return None
    if not isinstance(model.get("vocab"), dict):
        return empty
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair)
              for pair in model.get("merges", [])]
    made = build_pipeline(name, model["vocab"], merges, files.config)
    added = fast.get_added_tokens_decoder()
    made.add_tokens([token for _, token in sorted(added.items())])
    return made


def _by_transformers(files: TokenizerFiles) -> Any:
    """Return AutoTokenizer's reading, for classes that are unknown here; None if it has none."""
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            str(files.main.parent), local_files_only=True, trust_remote_code=False)
    except Exception:  # it raises what it likes for directories that it cannot read
        return None
