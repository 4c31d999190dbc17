"""Small files that travel from checkpoint to checkpoint: the tokenizer's, and those of the Hugging Face model a run started from.

They make every checkpoint complete: whoever exports one needs its directory alone. They are held in memory, since the checkpoint
they came from may be deleted while the run goes on.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sorted.checkpoint.candidates import Candidate
from megatron_sorted.checkpoint.layout import HUGGING_FACE, TOKENIZER, tokenizer_files_in
from megatron_sorted.errors import CheckpointError, DataError
from megatron_sorted.settings.run import Settings
from megatron_sorted.text.prompt_form import FILE, PromptForm, form_from_bytes
from megatron_sorted.text.tokenizer.files import JSON, MERGES, VOCABULARY, files_with
from megatron_sorted.training.run.resume import tokenizer_hashes

FORM = f"{TOKENIZER}/{FILE}"


def tokenizer_files(settings: Settings) -> dict[str, bytes]:
    """Return the content of the files of the run's tokenizer, by name within a checkpoint; none where it reads none.

    Raises:
        DataError: One cannot be read.
    """
    if settings.tokenizer_model is None:
        return {}
    path = Path(settings.tokenizer_model)
    if path.is_file() and (
        settings.tokenizer_type == "HuggingFaceTokenizer" or path.name in (JSON, VOCABULARY, MERGES)
    ):
        path = path.parent  # the directory is the tokenizer
    # whatever a sentencepiece file is called here, a Hugging Face directory made of the checkpoint is searched for tokenizer.model
    name = "tokenizer.model" if settings.tokenizer_type == "SentencePieceTokenizer" else path.name
    if path.is_file():  # with the settings beside it, by which it is read
        used = files_with(path)
        found = {
            f"{TOKENIZER}/{name if file == path else inside}": file for inside, file in used.items()
        }
    else:
        found = tokenizer_files_in(path)
    try:
        return {name: file.read_bytes() for name, file in found.items()}
    except OSError as error:
        raise DataError(
            f"--tokenizer-model: cannot read {error.filename} ({error.strerror}), which is to go into every checkpoint. "
            "Make it readable."
        ) from error


def own_files(settings: Settings, form: PromptForm | None) -> dict[str, bytes]:
    """Return the files that a run itself puts into its checkpoints: its tokenizer's, and the form of its data.

    Raises:
        DataError: One cannot be read.
    """
    return tokenizer_files(settings) | ({FORM: form.as_json().encode()} if form is not None else {})


def files_of_checkpoint(candidate: Candidate) -> dict[str, bytes]:
    """Return the content of the travelling files of a checkpoint, by name within it.

    Raises:
        CheckpointError: One cannot be read.
    """
    names = [
        name
        for name in candidate.manifest["files"]
        if name.startswith((f"{TOKENIZER}/", f"{HUGGING_FACE}/"))
    ]
    try:
        return {name: (candidate.directory / name).read_bytes() for name in names}
    except OSError as error:
        raise CheckpointError(
            f"{error.filename}: not readable ({error.strerror}), although it is to travel on with the run. "
            "Restore it, or load another checkpoint."
        ) from error


def carry_files(
    carried: Mapping[str, bytes],
    own: Mapping[str, bytes],
    saved_tokenizer: Mapping[str, Any] | None,
) -> dict[str, bytes]:
    """Return what goes into every checkpoint of a run.

    The Hugging Face files always travel. The run's own tokenizer replaces the checkpoint's; where it is the same one, named by one of
    its files alone, what belongs to it beside that file stays.

    Args:
        carried: Travelling files of the checkpoint the run started from.
        own: Those of the run's tokenizer.
        saved_tokenizer: What the checkpoint's manifest says of its tokenizer.
    """
    hashes = set() if saved_tokenizer is None else tokenizer_hashes(saved_tokenizer)
    reads = [name for name in own if name != FORM]
    same = not hashes.isdisjoint(hashlib.sha256(content).hexdigest() for content in own.values())
    mine = set(own.values())
    kept = {
        name: content
        for name, content in carried.items()
        if name.startswith(f"{HUGGING_FACE}/")
        or not reads
        or (same and content not in mine)
        or (name == FORM and same)
    }
    if FORM in kept and FORM in own and not form_from_bytes(own[FORM], FORM).is_conversation:
        own = {
            **own,
            FORM: _with_ends(kept[FORM], own[FORM]),
        }  # text does not change how a model is asked
    return {**kept, **own}


def _with_ends(carried: bytes, own: bytes) -> bytes:
    """Return the carried form with the end tokens of both."""
    form, other = form_from_bytes(carried, FORM), form_from_bytes(own, FORM)
    ends = {end.id: end for end in (*form.ends, *other.ends)}
    return dataclasses.replace(form, ends=tuple(ends.values())).as_json().encode()
