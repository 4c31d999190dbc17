"""The tokenizer of a model directory, also for transformers and lm-evaluation-harness."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from megatron_sorted.errors import DataError
from megatron_sorted.text.tokenizer import opening
from megatron_sorted.text.tokenizer.contract import Tokenizer
from megatron_sorted.text.tokenizer.fast import HuggingFaceTokenizer


def open_tokenizer(directory: Path, option: Path | None = None) -> Tokenizer:
    """Open the tokenizer of ``option``, a directory or a sentencepiece file, or of the model.

    Raises:
        DataError: The tokenizer is missing or cannot be read.
    """
    return opening.open_tokenizer(option or directory, option and "--tokenizer")


def prefix_id(tokenizer: Tokenizer) -> int:
    """Return the token before a text, from which its first token is predicted: bos, otherwise eos.

    Raises:
        DataError: The tokenizer has neither.
    """
    token = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if token is None:
        raise DataError(
            "The tokenizer has neither bos nor eos, so nothing can stand before a text. "
            "Give another one with --tokenizer."
        )
    return token


class SentencePieceForTransformers(SentencePieceBackend):
    """A transformers tokenizer that encodes and decodes by one of ours."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 - transformers reads it from the class
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, own: Tokenizer, **arguments):
        self.own, self._ids = own, own.vocabulary()
        super().__init__(**arguments)

    def __len__(self) -> int:
        return self.own.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Return {token: id}."""
        return dict(self._ids)

    def tokenize(self, text: str, **_) -> list[str]:
        """Return the tokens of a text, as spelled in the vocabulary."""
        return [self.own.token_text(token) for token in self.own.encode(text)]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Decode tokens into text."""
        return self.own.decode(self.convert_tokens_to_ids(list(tokens)))

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token, self.own.unk_id)

    def _decode(self, token_ids, skip_special_tokens: bool = False, **_) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(token) for token in token_ids]
        return self.own.decode(ids, skip_special_tokens)


def for_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """Return a transformers tokenizer that gives the ids of ``tokenizer``, bos included."""
    arguments = {
        name: token
        for name, token in tokenizer.special_tokens.items()
        if name in PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES
    }
    arguments.setdefault("pad_token", tokenizer.token_text(tokenizer.pad_id))
    templates = tokenizer.chat_templates
    arguments |= {
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "chat_template": templates.get("default") if set(templates) <= {"default"} else templates,
    }
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.fast, add_bos_token=tokenizer.adds_bos, **arguments
        )
    pattern = "bos" if tokenizer.adds_bos else "none"
    return SentencePieceForTransformers(
        tokenizer,
        vocab_file=str(tokenizer.files["tokenizer.model"]),
        special_tokens_pattern=pattern,
        **arguments,
    )
