"""Small files that a run copies from the checkpoint it started from into its own checkpoints.

They are the tokenizer's, and those of the Hugging Face model a run started from. They make every
checkpoint complete: to export one, its directory alone is needed. They are kept in memory, since
the checkpoint they came from may be deleted during the run.
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
    """Return the files of the run's tokenizer, if it has one, by name within a checkpoint.

    Raises:
        DataError: A file cannot be read.
    """
    if settings.tokenizer_model is None:
        return {}
    path = Path(settings.tokenizer_model)
    if path.is_file() and (
        settings.tokenizer_type == "HuggingFaceTokenizer" or path.name in (JSON, VOCABULARY, MERGES)
    ):
        path = path.parent  # the directory is the tokenizer
    # a Hugging Face directory written from the checkpoint must hold a sentencepiece file under the
    # name tokenizer.model, whatever its name is here
    name = "tokenizer.model" if settings.tokenizer_type == "SentencePieceTokenizer" else path.name
    if path.is_file():  # with the settings beside it, by which it is read
        files = {
            f"{TOKENIZER}/{name if file == path else inside}": file
            for inside, file in files_with(path).items()
        }
    else:
        files = tokenizer_files_in(path)
    try:
        return {name: file.read_bytes() for name, file in files.items()}
    except OSError as error:
        raise DataError(
            f"--tokenizer-model: cannot read {error.filename} ({error.strerror}), which is to go "
            "into every checkpoint. Make it readable."
        ) from error


def own_files(settings: Settings, form: PromptForm | None) -> dict[str, bytes]:
    """Return the files that a run itself adds: its tokenizer's, and the prompt form of its data.

    Raises:
        DataError: A file cannot be read.
    """
    return tokenizer_files(settings) | ({FORM: form.as_json().encode()} if form is not None else {})


def files_of_checkpoint(candidate: Candidate) -> dict[str, bytes]:
    """Return the content of a checkpoint's carried files, by name within it.

    Raises:
        CheckpointError: A file cannot be read.
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
            f"{error.filename}: not readable ({error.strerror}), although this run is to copy it "
            "into its checkpoints. Restore it, or load another checkpoint."
        ) from error


def carry_files(
    carried: Mapping[str, bytes],
    own: Mapping[str, bytes],
    saved_tokenizer: Mapping[str, Any] | None,
) -> dict[str, bytes]:
    """Return the files that go into every checkpoint of a run.

    The Hugging Face files are always carried. The run's own tokenizer replaces the checkpoint's.
    Where it is the same one, named by one of its files alone, the files that belong to it stay.

    Args:
        carried: The carried files of the checkpoint that the run started from.
        own: The files that the run itself adds.
        saved_tokenizer: The tokenizer in the checkpoint's manifest.
    """
    hashes = set() if saved_tokenizer is None else tokenizer_hashes(saved_tokenizer)
    has_tokenizer = any(name != FORM for name in own)
    same = not hashes.isdisjoint(hashlib.sha256(content).hexdigest() for content in own.values())
    own_contents = set(own.values())
    kept = {
        name: content
        for name, content in carried.items()
        if name.startswith(f"{HUGGING_FACE}/")
        or not has_tokenizer
        or (same and (name == FORM or content not in own_contents))
    }
    if FORM in kept and FORM in own and not form_from_bytes(own[FORM], FORM).is_conversation:
        # training on text does not change the form in which a model is prompted
        own = {**own, FORM: _with_ends(kept[FORM], own[FORM])}
    return {**kept, **own}


def _with_ends(carried: bytes, own: bytes) -> bytes:
    """Return the carried form with the end tokens of both."""
    form, other = form_from_bytes(carried, FORM), form_from_bytes(own, FORM)
    ends = {end.id: end for end in (*form.ends, *other.ends)}
    return dataclasses.replace(form, ends=tuple(ends.values())).as_json().encode()
