"""What llama-server makes of the written files: its tokens of texts, and the tokens it writes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_sorted.conversion.open_model import OpenModel
from megatron_sorted.errors import CheckpointError, PlatformError
from megatron_sorted.llama_cpp.gguf_file import GgufFile
from megatron_sorted.llama_cpp.next_tokens import (
    Agreement,
    beginnings,
    compare_next_tokens,
    vocabulary_problems,
)
from megatron_sorted.llama_cpp.server import LlamaServer, ServedModel
from megatron_sorted.llama_cpp.writing import BASE, WrittenFile
from megatron_sorted.text.prompt_form import PromptForm

TOKENIZER_MODEL = "tokenizer.ggml.model"
CONTEXT = 128
"""Longest text of the comparison, in tokens."""
CACHES = {BASE: "f32"}
"""Type of weights -> type of keys and values; f16, llama.cpp's default, for the others."""


@dataclass
class Check:
    """The outcome.

    Attributes:
        agreements: A row for each file that ran.
        notes: Sentences about files that did not.
    """

    agreements: list[Agreement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Return the rows as text."""
        head = f"{'exit':>5}  {'type':>8}  llama.cpp's next tokens that are transformers'"
        return "\n".join([head, *(one.line() for one in self.agreements)])


def puts_blank(path: Path) -> bool:
    """Return whether llama.cpp puts a blank before a text, as a file says."""
    metadata = GgufFile(path).metadata
    return bool(
        metadata.get("tokenizer.ggml.add_space_prefix", metadata[TOKENIZER_MODEL] == "llama")
    )


def check_files(
    program: Path,
    files: Sequence[WrittenFile],
    model: OpenModel,
    form: PromptForm | None,
    tolerance: float,
    threads: int,
    log: Callable[[str], None] = lambda line: None,
) -> Check:
    """Run every file, and judge what it writes; float32 must be the model's, but for near ties.

    Args:
        program: llama-server.
        files: The files.
        model: The nested model, as a Hugging Face directory.
        form: The prompt template that came with it.
        tolerance: Largest error of a logit, relative to the largest one.
        threads: Number of threads.
        log: Called with a line before each file.

    Raises:
        CheckpointError: A float32 file writes other tokens, or texts become other tokens.
        PlatformError: llama-server cannot run a float32 file.
    """
    check, prompts = Check(), beginnings(model)
    for number, file in enumerate(files):
        log(f"exit @{file.depth}: {file.kind} under llama-server")
        cache = CACHES.get(file.kind, "f16")
        try:
            served = ServedModel(program, file.path, threads, CONTEXT, cache=cache, flash="off")
            server = LlamaServer(served)
        except PlatformError as error:
            if file.kind == BASE:
                raise
            check.notes.append(f"{file.path.name}: not run: {error}")
            continue
        try:
            if number == 0:
                _refuse(file, vocabulary_problems(server, model, form, puts_blank(file.path)))
            agreement = compare_next_tokens(server, model, file.depth, file.kind, prompts)
        except PlatformError as error:
            if file.kind == BASE:
                raise
            check.notes.append(f"{file.path.name}: not run to the end: {error}")
            continue
        finally:
            server.stop()
        check.agreements.append(agreement)
        if file.kind == BASE:
            _refuse(file, agreement.problems(tolerance))
    return check


def _refuse(file: WrittenFile, problems: Sequence[str]) -> None:
    if problems:
        more = " ..." if len(problems) > 3 else ""
        raise CheckpointError(
            f"{file.path.name}: llama.cpp does not compute this model, so nothing was written. "
            f"{'; '.join(problems[:3])}{more}. --no-verify writes it nevertheless."
        )
