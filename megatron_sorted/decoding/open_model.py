"""Text generators from a Hugging Face directory or a checkpoint, with a model that drafts."""

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_sorted.decoding.network import Network, load_network
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.errors import SettingsError
from megatron_sorted.exported.checkpoint_as_directory import as_hugging_face_directory
from megatron_sorted.exported.generation_defaults import generation_defaults_of
from megatron_sorted.exported.tokenizer import open_tokenizer
from megatron_sorted.text.tokenizer.contract import Tokenizer


def open_text_generator(
    directory: Path,
    draft: Path | None = None,
    depths: Sequence[int] | None = None,
    tokenizer: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    prompt_template: str | None = None,
    native: str = "auto",
) -> TextGenerator:
    """Load a text generator from a Hugging Face directory or a checkpoint.

    Args:
        directory: Directory of the model.
        draft: Directory of another model that drafts; None without one.
        depths: Exits to use instead of those that the directory names.
        tokenizer: Directory or sentencepiece file, for a model without tokenizer.
        dtype: Data type of the weights; int8 for the compiled library alone.
        device: Device of the weights.
        prompt_template: Form of conversations instead of the one the model was trained in.
        native: Whether the compiled library decodes: "on", "off" or "auto"; see `load_network`.

    Raises:
        CheckpointError, SettingsError, DataError: A directory, tokenizer or form cannot be used.
    """
    opened = as_hugging_face_directory(directory)
    own = open_tokenizer(opened, tokenizer)
    form = generation_defaults_of(opened, own, prompt_template)
    network = load_network(opened, depths, dtype, device, native=native)
    form.check_rows(network.vocab_size)
    drafter = draft and open_draft(
        as_hugging_face_directory(draft), network, own, tokenizer, native
    )
    return TextGenerator(network, own, drafter, form)


def open_draft(
    directory: Path,
    network: Network,
    tokenizer: Tokenizer,
    option: Path | None = None,
    native: str = "auto",
) -> Network:
    """Load a model with the same tokenizer that drafts for another one.

    Where the two vocabularies are padded to different sizes, the draft model is resized. It has the
    kind of weights of the other one; where torch runs that, torch runs both.

    Args:
        directory: Directory of the draft model.
        network: The model that it drafts for.
        tokenizer: Tokenizer of ``network``.
        option: Tokenizer of both, for directories without one.
        native: Whether the compiled library decodes; see `load_network`.

    Raises:
        SettingsError: The tokenizers give tokens different numbers, or the compiled library is
            needed and cannot run the draft model.
    """
    native = native if network.is_native else "off"
    draft = load_network(directory, None, network.dtype, network.device, native=native)
    own = open_tokenizer(directory, option)
    if own.vocabulary() != tokenizer.vocabulary():
        raise SettingsError(
            f"draft model: its tokenizer ({own.vocab_size} tokens) gives other numbers than the "
            f"model's ({tokenizer.vocab_size}). Draft with a model of the same vocabulary."
        )
    return draft if draft.vocab_size == network.vocab_size else draft.resized(network.vocab_size)
