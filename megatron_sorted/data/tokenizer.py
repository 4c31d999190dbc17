"""The tokenizer that a run's settings name, and tokenizers trained on texts."""

import contextlib
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path

from megatron_sorted.errors import DataError
from megatron_sorted.reading.text_file import split_lines
from megatron_sorted.text.tokenizer.contract import NullTokenizer, Tokenizer
from megatron_sorted.text.tokenizer.opening import open_tokenizer

TYPES = ("SentencePieceTokenizer", "HuggingFaceTokenizer")
COVERAGE = 0.9995
"""Share of a text's characters that get pieces of their own, as in LLaMA's tokenizer."""
COUNTED_CHARACTERS = 10_000_000
"""Of a text, to know which are frequent."""
MOST_LINES = 500_000
"""So many are drawn where there are more."""
SMALLEST_VOCABULARY = 3 + 256
"""Control symbols and bytes."""


def load_tokenizer(
    tokenizer_type: str, tokenizer_model: str | None, vocab_size: int | None = None
) -> Tokenizer:
    """Return the tokenizer that a run names; ``vocab_size`` is for NullTokenizer.

    A directory has one reading, whatever the type; a sentencepiece file that is named itself is
    taken, unless the type is HuggingFaceTokenizer: then its directory is the tokenizer.

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
            f"--tokenizer-type: {tokenizer_type} is unknown. Use {', '.join(TYPES)} or NullTokenizer."
        )
    if not tokenizer_model:
        raise DataError(f"--tokenizer-type {tokenizer_type} needs --tokenizer-model.")
    path = Path(tokenizer_model)
    return open_tokenizer(path.parent if tokenizer_type == TYPES[1] and path.is_file() else path)


def frequent_characters(texts: Iterable[str], vocab_size: int) -> frozenset[str] | None:
    """Return the characters that get pieces of their own where the vocabulary is too small for all usual ones; None where it is not.

    Then half of the pieces that are not bytes are left for longer ones, and rarer characters are written as bytes.
    """
    counts, total = Counter(), 0
    for text in texts:
        counts.update(text)
        total += len(text)
        if total >= COUNTED_CHARACTERS:
            break
    room = max(vocab_size - SMALLEST_VOCABULARY, 0)
    if (
        bisect_left(list(accumulate(sorted(counts.values(), reverse=True))), COVERAGE * total)
        < room
    ):
        return None
    return frozenset(character for character, _ in counts.most_common(room // 2))


def train_sentencepiece(
    read_texts: Callable[[], Iterable[str]],
    path: str,
    vocab_size: int,
    model_type: str = "bpe",
    num_threads: int = 1,
) -> Tokenizer:
    """Return a tokenizer trained on the lines of texts and written to ``path``; the same texts give the same file.

    Text is kept as it is (no normalisation, spaces and newlines survive) and every byte can be written, as in LLaMA's tokenizer.

    Args:
        read_texts: Gives the texts, each time anew; asked twice.
        path: File to write.
        vocab_size: Pieces, bytes and control symbols included.
        model_type: Of sentencepiece.
        num_threads: Of sentencepiece.

    Raises:
        DataError: when the texts do not support such a vocabulary.
    """
    import sentencepiece

    partial = f"{path}.partial"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    known = frequent_characters(read_texts(), vocab_size)
    texts = (
        read_texts()
        if known is None
        else ("".join(one if one in known else "\n" for one in text) for text in read_texts())
    )
    lines = (line for text in texts for line in split_lines(text) if line)
    sentencepiece.set_random_generator_seed(0)
    try:
        with open(partial, "wb") as stream:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines,
                model_writer=stream,
                vocab_size=vocab_size,
                model_type=model_type,
                byte_fallback=True,
                character_coverage=COVERAGE if known is None else 1.0,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                split_digits=True,
                allow_whitespace_only_pieces=True,
                max_sentence_length=1 << 16,
                input_sentence_size=MOST_LINES,
                shuffle_input_sentence=True,
                num_threads=num_threads,
                minloglevel=2,
            )
        os.replace(partial, path)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"--train-tokenizer {vocab_size}: {str(error).rstrip('.')}. "
            "Choose another vocabulary size or give more text."
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
    return open_tokenizer(path)
