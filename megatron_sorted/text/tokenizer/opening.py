"""The one function that opens a tokenizer, whatever its files are."""

from pathlib import Path

from megatron_sorted.errors import DataError
from megatron_sorted.text.tokenizer.contract import Tokenizer
from megatron_sorted.text.tokenizer.fast import HuggingFaceTokenizer
from megatron_sorted.text.tokenizer.files import JSON, VOCABULARY, read_tokenizer_files
from megatron_sorted.text.tokenizer.pieces import SentencePieceTokenizer


def open_tokenizer(path: Path | str, flag: str | None = "--tokenizer-model") -> Tokenizer:
    """Open the tokenizer of a directory or sentencepiece file, read in the same manner everywhere.

    A directory's tokenizer.json is read as it is, with the tokens that tokenizer_config.json adds;
    without one its tokenizer.model, by sentencepiece itself; without either vocab.json and
    merges.txt by the rules of the class that the directory names. A sentencepiece file that is
    named itself is read with the settings beside it. Nothing is executed.

    Args:
        path: The directory or file.
        flag: The option that named it, for messages; None if it came with a model.

    Raises:
        DataError: It is missing, damaged, too large, or contradicts itself.
    """
    try:
        files = read_tokenizer_files(Path(path))
        is_fast = files.main.name in (JSON, VOCABULARY)
        return HuggingFaceTokenizer(files) if is_fast else SentencePieceTokenizer(files)
    except DataError as error:
        raise DataError(
            f"{flag}: {error}"
            if flag
            else f"{error} Give another one with --tokenizer DIRECTORY or FILE."
        ) from error
