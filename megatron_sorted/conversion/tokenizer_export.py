"""Tokenizer files that go out with a model: AutoTokenizer reads them as the model was trained.

Where transformers reads a directory otherwise than this project (it rebuilds some classes, puts no
bos that tokenizer_config.json asks for, keeps dropout), the files are written anew so that nothing
is left to read otherwise: tokenizer.json says everything, and the class takes it as it stands.
"""

from pathlib import Path
from typing import Any

from megatron_sorted.conversion.tokenizer_json import (
    FAST,
    OF_THE_OLD_CLASS,
    SETTINGS,
    add_ends,
    add_fast_tokenizer,
    write_settings,
)
from megatron_sorted.errors import CheckpointError
from megatron_sorted.files import write_text_atomically
from megatron_sorted.text.tokenizer import Tokenizer, open_tokenizer
from megatron_sorted.text.tokenizer_fast import MADE_OF, HuggingFaceTokenizer
from megatron_sorted.text.tokenizer_files import find_tokenizer, read_object


def write_for_transformers(directory: Path) -> list[str]:
    """Make AutoTokenizer read a model's directory as we do, and return lines about what was done.

    Raises:
        DataError: The tokenizer in the directory cannot be read.
    """
    lines = [line for line in (add_fast_tokenizer(directory),) if line is not None]
    if find_tokenizer(directory) is None:
        return lines
    tokenizer = open_tokenizer(directory, None)
    if isinstance(tokenizer, HuggingFaceTokenizer) and _needs_writing(tokenizer):
        lines += tokenizer.notes
        lines.append(_write_anew(directory, tokenizer))
    return lines


def _needs_writing(tokenizer: HuggingFaceTokenizer) -> bool:
    """Return whether something is left that other readers may take otherwise."""
    return tokenizer.differs_from_auto or FAST not in tokenizer.files


def _write_anew(directory: Path, tokenizer: HuggingFaceTokenizer) -> str:
    """Write what ``tokenizer`` is as tokenizer.json and a tokenizer_config.json that fits."""
    config = read_object(directory / SETTINGS)
    kept: dict[str, Any] = {
        name: value for name, value in config.items() if name not in OF_THE_OLD_CLASS}
    kept |= tokenizer.special_tokens
    kept |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": tokenizer.adds_bos,
             "add_eos_token": tokenizer.adds_eos, MADE_OF: sorted(tokenizer.hashes)}
    model = read_object(directory / "config.json")
    add_ends(tokenizer.fast, kept)
    write_text_atomically(directory / FAST, tokenizer.fast.to_str())
    write_settings(directory, kept, model.get("model_type"))
    _check_alike(directory, tokenizer)
    return f"{FAST} is written anew, so that AutoTokenizer reads it as the model was trained"


def _check_alike(directory: Path, tokenizer: Tokenizer) -> None:
    again = open_tokenizer(directory, None)
    if again.notes and getattr(again, "differs_from_auto", False):
        raise CheckpointError(f"{directory}: {again.notes[0]}, also after it was written anew. "
                              "Please report this directory.")
    assert again.vocab_size == tokenizer.vocab_size and again.adds_bos == tokenizer.adds_bos
