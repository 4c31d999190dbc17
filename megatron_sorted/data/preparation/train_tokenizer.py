"""Sentencepiece tokenizers trained on texts."""

import contextlib
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path

from megatron_sorted.errors import DataError
from megatron_sorted.reading.text_file import split_lines
from megatron_sorted.text.tokenizer.contract import Tokenizer
from megatron_sorted.text.tokenizer.opening import open_tokenizer

COVERAGE = 0.9995
"""Share of a text's characters that get pieces of their own, as in LLaMA's tokenizer."""
COUNTED_CHARACTERS = 10_000_000
"""Number of characters that are counted to determine the frequent ones."""
MAX_LINES = 500_000
"""Number of lines that are drawn if there are more."""
SMALLEST_VOCABULARY = 3 + 256
"""Number of control symbols and bytes."""


def frequent_characters(texts: Iterable[str], vocab_size: int) -> frozenset[str] | None:
    """Return the characters that get pieces of their own in a small vocabulary.

    It is None where the vocabulary has room for all usual characters. Otherwise half of the pieces
    that are not bytes are left for longer ones, and rarer characters are written as bytes.
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
    """Train a tokenizer on the lines of texts and write it to ``path``.

    The same texts give the same file. Text is kept as it is (no normalisation, spaces and newlines
    survive) and every byte can be written, as in LLaMA's tokenizer.

    Args:
        read_texts: A function that returns the texts from the beginning; it is called twice.
        path: The file to write.
        vocab_size: The number of pieces, bytes and control symbols included.
        model_type: Sentencepiece's type of model.
        num_threads: The number of threads of sentencepiece.

    Raises:
        DataError: The texts do not support such a vocabulary.
    """
    import sentencepiece

    partial = f"{path}.partial"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    known = frequent_characters(read_texts(), vocab_size)
    if known is not None and not known:
        raise DataError(
            f"--train-tokenizer {vocab_size}: bytes and control symbols alone are "
            f"{SMALLEST_VOCABULARY}, and characters need room too. Give more."
        )
    texts = (
        read_texts()
        if known is None
        else (
            "".join(letter if letter in known else "\n" for letter in text) for text in read_texts()
        )
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
                input_sentence_size=MAX_LINES,
                shuffle_input_sentence=True,
                num_threads=num_threads,
                minloglevel=2,
            )
        os.replace(partial, path)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"--train-tokenizer {vocab_size}: {str(error).rstrip('.')}. Choose another vocabulary "
            "size or give more text."
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
    return open_tokenizer(path)
