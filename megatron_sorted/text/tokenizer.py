"""One contract for every tokenizer, and the one function that opens them."""

from abc import ABC, abstractmethod
from pathlib import Path

from megatron_sorted.errors import DataError

Span = tuple[int, int]


class Tokenizer(ABC):
    """Text to token ids and back.

    The names of control and added tokens in a text stand for these tokens, as everywhere in
    transformers: ids equal ``AutoTokenizer(text, add_special_tokens=False)``.

    Attributes:
        vocab_size: one more than the largest id.
        text_size: one more than the largest id of a text that names no added token.
        bos_id, eos_id, unk_id: None where the tokenizer has none.
        pad_id: what fills unused positions (never trained on); eos or 0 where the tokenizer has none.
        adds_bos, adds_eos: whether its texts start with bos and end with eos, by its convention.
        name, sha256: of the file that holds its vocabulary.
        hashes: sha256 of every form of this vocabulary (sentencepiece, tokenizer.json).
        special_tokens: {"bos_token": "<s>", ...}, as chat templates want them.
        special_ids: of control tokens, which decoding can leave out.
        chat_templates: {name: jinja text}.
        files: every file it was read from, by its name within a directory.
        notes: lines that say which of several readings is used; for every command to show.
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
    def encode_rendered_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        """Return the ids of a text, and of each the characters [begin, end) it stands for.

        Several ids of one character have that character in common.
        """

    @abstractmethod
    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids; control tokens by their names, or left out."""

    @abstractmethod
    def token_text(self, token: int) -> str:
        """Return how the vocabulary writes a token; an empty text for an id without one."""

    @abstractmethod
    def vocabulary(self) -> dict[str, int]:
        """Return {how the vocabulary writes a token: id}."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, without bos and eos."""
        return self.encode_batch([text])[0]

    def encode_rendered(self, text: str) -> list[int]:
        """Return the ids of a rendered chat template, which brings its own bos."""
        return self.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text that a model continues: bos first where texts begin with it."""
        return [*([self.bos_id] if self.adds_bos else []), *self.encode(text)]


class NullTokenizer(Tokenizer):
    """Numbers separated by blanks; the last id is eos."""

    def __init__(self, vocab_size: int):
        self.vocab_size = self.text_size = vocab_size
        self.bos_id, self.eos_id, self.pad_id = None, vocab_size - 1, vocab_size - 1
        self.adds_bos = False
        self.name, self.sha256, self.hashes = f"null-{vocab_size}", "", frozenset(("",))
        self.special_tokens, self.chat_templates, self.files = {}, {}, {}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the numbers in each text.

        Raises:
            DataError: A word is no number, or not one of the vocabulary.
        """
        try:
            batch = [[int(word) for word in text.split()] for text in texts]
        except ValueError as error:
            raise DataError(f"NullTokenizer reads numbers only: {error}. "
                            "Use another --tokenizer-type for text.") from error
        for i in (i for ids in batch for i in ids):
            if not 0 <= i < self.vocab_size:
                raise DataError(f"NullTokenizer: {i} is not one of 0..{self.vocab_size - 1}. "
                                "Raise --vocab-size.")
        return batch

    def encode_rendered_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        """Return the numbers in a text and where they stand."""
        spans, end = [], 0
        for word in text.split():
            begin = text.index(word, end)
            end = begin + len(word)
            spans.append((begin, end))
        return self.encode(text), spans

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """Return the numbers as text."""
        return " ".join(str(i) for i in ids)

    def token_text(self, token: int) -> str:
        """Return the number as text."""
        return str(token)

    def vocabulary(self) -> dict[str, int]:
        """Return every number."""
        return {str(i): i for i in range(self.vocab_size)}


def open_tokenizer(path: Path | str, flag: str | None = "--tokenizer-model") -> Tokenizer:
    """Return the tokenizer of a directory or sentencepiece file, the same reading everywhere.

    A directory's tokenizer.json is read as it stands, with the tokens that tokenizer_config.json
    adds; without one its tokenizer.model, by sentencepiece itself; without either vocab.json and
    merges.txt by the rules of the class that the directory names. A sentencepiece file that is
    named itself is read with the settings beside it. Nothing is executed.

    Args:
        path: The directory or file.
        flag: The option that named it, for messages; None where it came with a model.

    Raises:
        DataError: It is missing, damaged, larger than reason, or contradicts itself.
    """
    from megatron_sorted.text.tokenizer_fast import HuggingFaceTokenizer
    from megatron_sorted.text.tokenizer_files import JSON, VOCABULARY, read_tokenizer_files
    from megatron_sorted.text.tokenizer_pieces import SentencePieceTokenizer

    try:
        files = read_tokenizer_files(Path(path))
        is_fast = files.main.name in (JSON, VOCABULARY)
        return HuggingFaceTokenizer(files) if is_fast else SentencePieceTokenizer(files)
    except DataError as error:
        raise DataError(f"{flag}: {error}" if flag else f"{error} Another one is given with "
                        "--tokenizer DIRECTORY or FILE.") from error
