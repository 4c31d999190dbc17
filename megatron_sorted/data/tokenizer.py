"""The tokenizer that the settings of a run name."""

from pathlib import Path

from megatron_sorted.errors import DataError
from megatron_sorted.text.tokenizer.contract import NullTokenizer, Tokenizer
from megatron_sorted.text.tokenizer.opening import open_tokenizer

TYPES = ("SentencePieceTokenizer", "HuggingFaceTokenizer")


def load_tokenizer(
    tokenizer_type: str, tokenizer_model: str | None, vocab_size: int | None = None
) -> Tokenizer:
    """Open the tokenizer that a run names; ``vocab_size`` is for NullTokenizer.

    A directory is read in the same manner, whatever the type. A sentencepiece file that is named
    itself is
    used, unless the type is HuggingFaceTokenizer: then its directory is the tokenizer.

    Raises:
        DataError: The file or directory is missing or damaged.
    """
    if tokenizer_type == "NullTokenizer":
        if not vocab_size or vocab_size < 1:
            raise DataError(
                "--tokenizer-type NullTokenizer knows no vocabulary. Give --vocab-size."
            )
        return NullTokenizer(vocab_size)
    if tokenizer_type not in TYPES:
        raise DataError(
            f"--tokenizer-type: {tokenizer_type} is unknown. Use {', '.join(TYPES)} or "
            "NullTokenizer."
        )
    if not tokenizer_model:
        raise DataError(f"--tokenizer-type {tokenizer_type} needs --tokenizer-model.")
    path = Path(tokenizer_model)
    return open_tokenizer(path.parent if tokenizer_type == TYPES[1] and path.is_file() else path)
