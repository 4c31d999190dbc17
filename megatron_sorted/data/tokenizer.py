"""Tokenizers behind one small contract: sentencepiece files, Hugging Face directories, and plain numbers."""

import contextlib
import hashlib
import json
import os
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path

from megatron_sorted.errors import DataError

COVERAGE = 0.9995
"""Share of a text's characters that get pieces of their own, as in LLaMA's tokenizer."""
COUNTED_CHARACTERS = 10_000_000
"""Of a text, to know which are frequent."""
SMALLEST_VOCABULARY = 3 + 256
"""Control symbols and bytes."""


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: one more than the largest id.
        bos_id, eos_id: None where the tokenizer has none.
        pad_id: what fills unused positions (never trained on); eos or 0 where the tokenizer has none.
        adds_bos: whether its texts start with bos, by its own convention.
        name, sha256: of the file it was read from.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    adds_bos: bool
    name: str
    sha256: str

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text, without bos and eos."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of one text, without bos and eos."""
        return self.encode_batch([text])[0]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"--tokenizer-model: cannot read {path} ({error.strerror}). Give a tokenizer that exists.") from error


def _pad_or_default(pad_id: int | None, eos_id: int | None) -> int:
    return next((i for i in (pad_id, eos_id) if i is not None), 0)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model file, as of LLaMA."""

    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        data = _read_bytes(path)
        try:
            self._processor = SentencePieceProcessor(model_proto=data)
            self.vocab_size = self._processor.vocab_size()
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(f"--tokenizer-model: {path} ({len(data)} bytes) is not a sentencepiece model: {error}. "
                            "Give an intact tokenizer.model, or train one with tools/prepare_data.py --train-tokenizer.") from error
        if not data or not self.vocab_size:
            raise DataError(f"--tokenizer-model: {path} is empty. Give an intact sentencepiece model.")
        ids = (self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id())
        self.bos_id, self.eos_id, pad_id = (i if i >= 0 else None for i in ids)
        self.pad_id = _pad_or_default(pad_id, self.eos_id)
        self.adds_bos = self.bos_id is not None
        self.name, self.sha256 = path.name, hashlib.sha256(data).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text, without bos and eos; one thread, since callers run several processes."""
        return self._processor.encode(texts, out_type=int, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids."""
        return self._processor.decode(list(ids))


class HuggingFaceTokenizer(Tokenizer):
    """The ``tokenizer.json`` of a Hugging Face directory; nothing in the directory is executed."""

    def __init__(self, directory: Path):
        try:
            from tokenizers import Tokenizer as FastTokenizer
        except ImportError as error:
            raise DataError("--tokenizer-type HuggingFaceTokenizer needs the package 'tokenizers'. pip install tokenizers.") from error
        path = directory / "tokenizer.json"
        data = _read_bytes(path)
        try:
            self._fast = FastTokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for a damaged file
            raise DataError(f"--tokenizer-model: {path} is not a tokenizer: {error}. Give an intact directory.") from error
        # Files made for padded batches carry these settings; they would silently cut documents.
        self._fast.no_truncation()
        self._fast.no_padding()
        self.vocab_size = max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        special = {**_read_json(directory / "special_tokens_map.json"), **_read_json(directory / "tokenizer_config.json")}
        self.bos_id, self.eos_id, pad_id = (self._special_id(special.get(f"{name}_token")) for name in ("bos", "eos", "pad"))
        self.pad_id = _pad_or_default(pad_id, self.eos_id)
        starts_with = self._fast.encode("", add_special_tokens=True).ids[:1]
        self.adds_bos = self.bos_id is not None and (special.get("add_bos_token") is True or starts_with == [self.bos_id])
        self.name, self.sha256 = f"{directory.name}/{path.name}", hashlib.sha256(data).hexdigest()

    def _special_id(self, token: object) -> int | None:
        content = token.get("content") if isinstance(token, dict) else token
        return self._fast.token_to_id(content) if isinstance(content, str) else None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text, without bos and eos."""
        return [encoding.ids for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids."""
        return self._fast.decode(list(ids), skip_special_tokens=False)


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"--tokenizer-model: {path} is not JSON: {error}. Give an intact directory.") from error
    return value if isinstance(value, dict) else {}


class NullTokenizer(Tokenizer):
    """Numbers separated by blanks; the last id is eos."""

    def __init__(self, vocab_size: int):
        self.vocab_size, self.bos_id, self.eos_id, self.pad_id = vocab_size, None, vocab_size - 1, vocab_size - 1
        self.adds_bos = False
        self.name, self.sha256 = f"null-{vocab_size}", ""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the numbers in each text."""
        try:
            batch = [[int(word) for word in text.split()] for text in texts]
        except ValueError as error:
            raise DataError(f"NullTokenizer reads numbers only: {error}. Use another --tokenizer-type for text.") from error
        for i in (i for ids in batch for i in ids):
            if not 0 <= i < self.vocab_size:
                raise DataError(f"NullTokenizer: {i} is not one of 0..{self.vocab_size - 1}. Raise --vocab-size.")
        return batch

    def decode(self, ids: list[int]) -> str:
        """Returns the numbers as text."""
        return " ".join(str(i) for i in ids)


def load_tokenizer(tokenizer_type: str, tokenizer_model: str | None, vocab_size: int | None = None) -> Tokenizer:
    """Returns the tokenizer of that kind; ``vocab_size`` is for NullTokenizer.

    Raises:
        DataError: when the file or directory is missing or damaged.
    """
    if tokenizer_type == "NullTokenizer":
        if not vocab_size or vocab_size < 1:
            raise DataError("--tokenizer-type NullTokenizer knows no vocabulary. Give --vocab-size.")
        return NullTokenizer(vocab_size)
    if not tokenizer_model:
        raise DataError(f"--tokenizer-type {tokenizer_type} needs --tokenizer-model.")
    path = Path(tokenizer_model)
    if tokenizer_type == "SentencePieceTokenizer":
        return SentencePieceTokenizer(path / "tokenizer.model" if path.is_dir() else path)
    if tokenizer_type != "HuggingFaceTokenizer":
        raise DataError(f"--tokenizer-type: {tokenizer_type} is unknown. "
                        "Use SentencePieceTokenizer, HuggingFaceTokenizer or NullTokenizer.")
    directory = path if path.is_dir() else path.parent
    if not (directory / "tokenizer.json").is_file() and (directory / "tokenizer.model").is_file():
        return SentencePieceTokenizer(directory / "tokenizer.model")
    return HuggingFaceTokenizer(directory)


def frequent_characters(texts: Iterable[str], vocab_size: int) -> frozenset[str] | None:
    """Returns the characters that get pieces of their own where the vocabulary is too small for all usual ones; None where it is not.

    Then half of the pieces that are not bytes are left for longer ones, and rarer characters are written as bytes.
    """
    counts, total = Counter(), 0
    for text in texts:
        counts.update(text)
        total += len(text)
        if total >= COUNTED_CHARACTERS:
            break
    room = max(vocab_size - SMALLEST_VOCABULARY, 0)
    if bisect_left(list(accumulate(sorted(counts.values(), reverse=True))), COVERAGE * total) < room:
        return None
    return frozenset(character for character, _ in counts.most_common(room // 2))


def train_sentencepiece(read_texts: Callable[[], Iterable[str]], path: str, vocab_size: int, model_type: str = "bpe",
                        num_threads: int = 1, max_lines: int = 500_000) -> Tokenizer:
    """Returns a tokenizer trained on the lines of texts and written to ``path``; the same texts give the same file.

    Text is kept as it is (no normalisation, spaces and newlines survive) and every byte can be written, as in LLaMA's tokenizer.

    Args:
        read_texts: Gives the texts, each time anew; asked twice.
        path: File to write.
        vocab_size: Pieces, bytes and control symbols included.
        model_type: Of sentencepiece.
        num_threads: Of sentencepiece.
        max_lines: So many are drawn where there are more.

    Raises:
        DataError: when the texts do not support such a vocabulary.
    """
    import sentencepiece

    partial = f"{path}.partial"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    known = frequent_characters(read_texts(), vocab_size)
    texts = read_texts() if known is None else ("".join(one if one in known else "\n" for one in text) for text in read_texts())
    lines = (line for text in texts for line in text.splitlines() if line)
    sentencepiece.set_random_generator_seed(0)
    try:
        with open(partial, "wb") as stream:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines, model_writer=stream, vocab_size=vocab_size, model_type=model_type, byte_fallback=True,
                character_coverage=COVERAGE if known is None else 1.0, normalization_rule_name="identity",
                remove_extra_whitespaces=False, split_digits=True,
                allow_whitespace_only_pieces=True, max_sentence_length=1 << 16, input_sentence_size=max_lines,
                shuffle_input_sentence=True, num_threads=num_threads, minloglevel=2)
        os.replace(partial, path)
    except (RuntimeError, OSError) as error:
        raise DataError(f"--train-tokenizer {vocab_size}: {str(error).rstrip('.')}. "
                        "Choose another vocabulary size or give more text.") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
    return SentencePieceTokenizer(Path(path))
