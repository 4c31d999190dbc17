"""The pipelines that tokenizer classes of transformers 5 build, whatever tokenizer.json says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BLANK = "\u2581"
END_OF_TEXT = "<|endoftext|>"
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
AS_WRITTEN = frozenset(
    ("PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "PythonBackend")
)
"""Class names for which tokenizer.json is used as it is."""
CLASS_OF_TYPE = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}
ALWAYS_OF_TYPE = {"qwen2": "Qwen2Tokenizer"}
"""Model types for which AutoTokenizer uses its own class, whatever a directory names."""
NEVER_OF_TYPE = frozenset(("mistral",))
"""Model types for which AutoTokenizer uses tokenizer.json as it is, whatever class is named."""


@dataclass(frozen=True)
class TokenizerClass:
    """A class that builds its own pipeline from a vocabulary of byte pairs.

    Attributes:
        defaults: The special tokens that it has where files name none.
        adds_bos: Whether its texts begin with bos unless files say otherwise.
    """

    defaults: Mapping[str, str]
    adds_bos: bool = False


CLASSES = {
    "LlamaTokenizer": TokenizerClass(
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, adds_bos=True
    ),
    "GPT2Tokenizer": TokenizerClass(
        {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    ),
    "Qwen2Tokenizer": TokenizerClass(
        {"eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    ),
    "GPTNeoXTokenizer": TokenizerClass(
        {
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "pad_token": "<|padding|>",
        }
    ),
}


def class_of(name: str | None, model_type: str | None) -> str | None:
    """Return the class that a directory names, or that of its model type; None for neither."""
    return name or CLASS_OF_TYPE.get(model_type or "")


def build_pipeline(
    class_name: str,
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    config: Mapping[str, Any],
) -> "Tokenizer | None":
    """Build the tokenizer of a class from a vocabulary; None for an unknown class.

    Source: ``__init__`` of these classes in transformers 5.

    Args:
        class_name: One of CLASSES.
        vocabulary: {token: id}.
        merges: Pairs of tokens, best first.
        config: The content of tokenizer_config.json: add_prefix_space, legacy.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if class_name not in CLASSES:
        return None
    add_prefix = config.get("add_prefix_space")
    if class_name == "LlamaTokenizer":
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=True, byte_fallback=True))
        adds_space = add_prefix is None or bool(add_prefix)
        scheme = ("always" if config.get("legacy") else "first") if adds_space else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            BLANK, prepend_scheme=scheme, split=False
        )
        steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * adds_space)
        return tokenizer
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="")
    )
    tokenizer.decoder = decoders.ByteLevel()
    if class_name == "Qwen2Tokenizer":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=bool(add_prefix), use_regex=False),
            ]
        )
        return tokenizer
    tokenizer.normalizer = normalizers.NFC() if class_name == "GPTNeoXTokenizer" else None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(add_prefix))
    return tokenizer
