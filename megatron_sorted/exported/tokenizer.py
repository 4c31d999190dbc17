"""The tokenizer of a model directory, as transformers and lm-evaluation-harness want it."""

from pathlib import Path

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from megatron_sorted.errors import DataError
from megatron_sorted.exported.json_file import read_object

PASSED_ON = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template")
"""Entries of tokenizer_config.json that a bare sentencepiece file needs beside it."""


class SentencePieceTokenizer(SentencePieceBackend):
    """A sentencepiece file alone, asked itself.

    AutoTokenizer rebuilds such a file with another library; for llama2.c's 512 pieces the ids then differ, and every number with them.
    Text is text: names of special tokens in it are not special, as in data preparation.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 - transformers reads it from the class
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Returns the text of pieces; bytes are put together to characters."""
        return self.sp_model.decode_pieces(list(tokens))

    def _decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(token) for token in token_ids]
        special, text, run = set(self.all_special_ids), "", []
        for token in ids:
            if token in special:  # sentencepiece itself writes nothing for them
                text += self.sp_model.decode(run) + ("" if skip_special_tokens else self._convert_id_to_token(token))
                run = []
            elif token < self.sp_model.get_piece_size():
                run.append(token)
        return text + self.sp_model.decode(run)


def open_tokenizer(directory: Path, option: Path | None = None) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of ``option`` (a directory or a sentencepiece file) or of the model's directory; nothing is executed.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    place = option or directory
    if place.is_file():
        return _open_sentencepiece(place)
    has_fast = (place / "tokenizer.json").is_file() or (place / "vocab.json").is_file()
    if not has_fast and (place / "tokenizer.model").is_file():
        return _open_sentencepiece(place / "tokenizer.model")
    if not has_fast:
        raise DataError(f"{place}: no tokenizer (tokenizer.json or tokenizer.model). "
                        + ("Give another --tokenizer." if option else "Give --tokenizer DIRECTORY or FILE."))
    try:
        # AutoTokenizer passes over this name for models of type qwen2, and takes Qwen's class
        is_plain = read_object(place / "tokenizer_config.json").get("tokenizer_class") == "PreTrainedTokenizerFast"
        reader = PreTrainedTokenizerFast if is_plain and (place / "tokenizer.json").is_file() else AutoTokenizer
        return reader.from_pretrained(str(place), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises bare Exception for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{place}: the tokenizer cannot be read ({reason}). Give an intact one with --tokenizer.") from error


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Returns the ids of each text, without bos and eos; no text is cut."""
    return tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"] if texts else []


def prefix_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns what a text's first token is predicted from: bos, or eos where the tokenizer has no bos.

    Raises:
        DataError: It has neither.
    """
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise DataError("The tokenizer has neither bos nor eos, so nothing can stand before a text. Give another one with --tokenizer.")
    return token


def _open_sentencepiece(path: Path) -> SentencePieceTokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_proto=path.read_bytes())
        if not pieces.get_piece_size():
            raise ValueError("no pieces")
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{path}: not a sentencepiece model ({error}). Give an intact one with --tokenizer.") from error
    written = path.parent / "tokenizer_config.json"
    try:
        return _with_words(path, pieces, read_object(written))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{written}: not as a tokenizer writes it ({error}). Give an intact one with --tokenizer.") from error


def _with_words(path: Path, pieces, written: dict) -> SentencePieceTokenizer:
    """Returns the tokenizer of a file whose pieces are read, with what its tokenizer_config.json says."""
    ids = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id(), "pad_token": pieces.pad_id()}
    words = {name: pieces.id_to_piece(number) for name, number in ids.items() if number >= 0}
    words |= {name: value["content"] if isinstance(value, dict) else value for name in PASSED_ON if (value := written.get(name))}
    words.setdefault("pad_token", words.get("eos_token", words.get("unk_token")))
    adds_bos = written.get("add_bos_token", True) and "bos_token" in words
    added = {int(number): AddedToken(token["content"], special=bool(token.get("special"))) for number, token in
             (written.get("added_tokens_decoder") or {}).items() if isinstance(token, dict) and "content" in token}
    return SentencePieceTokenizer(vocab_file=str(path), special_tokens_pattern="bos" if adds_bos else "none", split_special_tokens=True,
                                  padding_side="left", clean_up_tokenization_spaces=False, added_tokens_decoder=added, **words)
