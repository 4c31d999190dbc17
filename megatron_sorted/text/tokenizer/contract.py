"""The contract of every tokenizer, and the simplest one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from megatron_sorted.errors import DataError


class Tokenizer(ABC):
    """Text to token ids and back.

    The names of control and added tokens in a text stand for these tokens, as everywhere in
    transformers: ids equal ``AutoTokenizer(text, add_special_tokens=False)``.

    Attributes:
        vocab_size: The largest id plus one.
        text_size: The largest id of a text that names no added token, plus one.
        bos_id, eos_id, unk_id: The ids of these tokens; None where the tokenizer has none.
        pad_id: The id that fills unused positions, which are never trained on; eos or 0 where the
            tokenizer has none.
        adds_bos, adds_eos: Whether its texts start with bos and end with eos, by its convention.
        name, sha256: The name and hash of the file that holds its vocabulary.
        hashes: The sha256 of every form of this vocabulary (sentencepiece, tokenizer.json).
        special_tokens: {"bos_token": "<s>", ...}, as chat templates read them.
        special_ids: The ids of control tokens, which decoding can leave out.
        chat_templates: {name: jinja text}.
        files: Every file it was read from, by its name within a directory.
        notes: Lines that state which of several readings is used; every command prints them.
    """

    vocab_size: int
    text_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    unk_id: int | None = None
    adds_bos: bool
    adds_eos: bool = False
    name: str
    sha256: str
    hashes: frozenset[str] = frozenset()
    special_tokens: dict[str, str]
    special_ids: frozenset[int] = frozenset()
    chat_templates: dict[str, str]
    files: dict[str, Path]
    notes: tuple[str, ...] = ()

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without bos and eos."""

    @abstractmethod
    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids; control tokens by their names, or left out."""

    @abstractmethod
    def token_text(self, token: int) -> str:
        """Return how the vocabulary writes a token; an empty text for an id without one."""

    @abstractmethod
    def vocabulary(self) -> dict[str, int]:
        """Return {how the vocabulary writes a token: id}."""

    def _take_special_ids(self, ids: Mapping[str, int | None]) -> None:
        """Store the ids of {"bos_token": id, ...}; without a pad token, eos or 0 is the padding."""
        self.bos_id, self.eos_id = ids.get("bos_token"), ids.get("eos_token")
        self.unk_id, pad_id = ids.get("unk_token"), ids.get("pad_token")
        self.pad_id = next((i for i in (pad_id, self.eos_id) if i is not None), 0)

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, without bos and eos."""
        return self.encode_batch([text])[0]

    def encode_rendered(self, text: str) -> list[int]:
        """Return the ids of a rendered chat template, which contains its own bos."""
        return self.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text that a model continues; bos first where texts begin with it."""
        return [*([self.bos_id] if self.adds_bos else []), *self.encode(text)]


class NullTokenizer(Tokenizer):
    """A tokenizer of numbers separated by blanks; the last id is eos.

    >>> NullTokenizer(8).encode("3 1 4")
    [3, 1, 4]
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = self.text_size = vocab_size
        self.bos_id, self.eos_id, self.pad_id = None, vocab_size - 1, vocab_size - 1
        self.adds_bos = False
        self.name, self.sha256, self.hashes = f"null-{vocab_size}", "", frozenset(("",))
        self.special_tokens, self.chat_templates, self.files = {}, {}, {}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the numbers in each text.

        Raises:
            DataError: A text holds something else than numbers, or a number outside the vocabulary.
        """
        try:
            batch = [[int(number) for number in text.split()] for text in texts]
        except ValueError as error:
            raise DataError(
                f"NullTokenizer reads numbers only: {error}. Use another --tokenizer-type for text."
            ) from error
        for i in (i for ids in batch for i in ids):
            if not 0 <= i < self.vocab_size:
                raise DataError(
                    f"NullTokenizer: {i} is not one of 0..{self.vocab_size - 1}. Raise "
                    "--vocab-size."
                )
        return batch

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """Return the numbers as text."""
        return " ".join(str(i) for i in ids)

    def token_text(self, token: int) -> str:
        """Return the number as text."""
        return str(token)

    def vocabulary(self) -> dict[str, int]:
        """Return every number."""
        return {str(i): i for i in range(self.vocab_size)}
