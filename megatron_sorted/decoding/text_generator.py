"""Text in, text out: a network with its tokenizer, texts that end at stop words, pieces as they come."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_sorted.decoding.generate import Added, Limits, stream
from megatron_sorted.decoding.network import Network, load_network
from megatron_sorted.decoding.strategies import SPECULATIVE, SamplingParameters, Strategy
from megatron_sorted.errors import DataError, SettingsError
from megatron_sorted.exported.form import ModelForm, form_of_model
from megatron_sorted.exported.model_directory import open_model_directory
from megatron_sorted.exported.tokenizer import open_tokenizer
from megatron_sorted.text.tokenizer.contract import Tokenizer
from megatron_sorted.text.tokenizer.fit import surplus_line

BROKEN = "\ufffd"
"""What a tokenizer writes for bytes that are no character yet."""
ANCHOR = "a"
"""Text behind which new text is decoded: some tokenizers leave out the space before a text's first word."""


@dataclass
class StreamedText:
    """What came to one text.

    Attributes:
        row: Of the prompts.
        parts: (text, exit) of every token; the text of one that ends no character, or may begin a stop word, comes with a later one.
        added: The tokens.
        finish: Why the text is over, or None.
    """

    row: int
    parts: list[tuple[str, int]]
    added: Added
    finish: str | None

    @property
    def text(self) -> str:
        """Return the new text."""
        return "".join(text for text, _ in self.parts)


@dataclass
class _Row:
    """Text of one row, as far as it is sure.

    Attributes:
        ids: Tokens that were added, behind those of the anchor.
        first: The first of those that are decoded together with new ones: a tokenizer may write a token otherwise behind another.
        done: Those before it are text already.
        held: Text and exits that are kept back, since a stop word may begin there.
    """

    ids: list[int] = field(default_factory=list)
    first: int = 0
    done: int = 0
    held: list[tuple[str, int]] = field(default_factory=list)


class TextGenerator:
    """A model that writes.

    Args:
        network: The model.
        tokenizer: Its own.
        draft: Another model that drafts, if any.
        form: In which conversations are written; by default contents one below the other, as before version 0.7.

    Raises:
        DataError: The model's end tokens are no tokens of it, or its tokenizer belongs to another model.
    """

    def __init__(
        self,
        network: Network,
        tokenizer: Tokenizer,
        draft: Network | None = None,
        form: ModelForm | None = None,
    ):
        self.network, self.tokenizer, self.draft = network, tokenizer, draft
        self.form = form = form or ModelForm()
        self.end_ids = form.end_ids_of(network.model, tokenizer)
        line = surplus_line(tokenizer, network.vocab_size, "--tokenizer")
        self.notes = tokenizer.notes if line is None else (*tokenizer.notes, line)

    def draft_for(self, strategy: Strategy | type[Strategy] | None) -> Network | None:
        """Return the other model that drafts; None for ways, or kinds of them, that draft nothing."""
        kind = strategy if isinstance(strategy, type) else type(strategy)
        return self.draft if issubclass(kind, SPECULATIVE) else None

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a prompt, with what the tokenizer puts before texts; of an empty one that alone.

        Raises:
            DataError: Nothing is left.
        """
        ids = self.tokenizer.encode_prompt(text)
        if not ids and self.tokenizer.bos_id is not None:
            ids = [self.tokenizer.bos_id]
        if not ids:
            raise DataError(
                "prompt: it is empty, and the tokenizer puts nothing before a text. Write something."
            )
        return ids

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Return the tokens of a conversation [{"role": ..., "content": ...}] up to where the assistant answers.

        Raises:
            DataError: The form does not take these messages.
        """
        form = self.form.prompt_form
        if form is None or not form.is_conversation:
            return self.encode("".join(f"{message['content']}\n" for message in messages))
        return self.tokenizer.encode_rendered(form.render(messages, tools))

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        strategy: Strategy | None = None,
        sampling: SamplingParameters | None = None,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
    ) -> Iterator[StreamedText]:
        """Yield what comes to each text; stop words are left out. The draft model is left alone by ways that draft nothing.

        Errors as for ``generate.stream``.
        """
        anchor = self.tokenizer.encode_batch([ANCHOR])[0]
        rows = [self._begin(prompt, anchor) for prompt in prompts]
        longest, before = max(map(len, stop), default=0), len(self.tokenizer.decode(anchor))

        def tail(tokens: list[int]) -> str:  # a character takes at most four tokens
            return self.tokenizer.decode([*anchor, *tokens[-(4 * longest + 8) :]])[before:]

        limits = Limits(max_new_tokens, self.end_ids, tuple(stop), tail)
        for added in stream(
            self.network, prompts, strategy, sampling, limits, self.draft_for(strategy)
        ):
            row = rows[added.row]
            for place, (token, depth) in enumerate(zip(added.tokens, added.depths, strict=True), 1):
                if token not in self.end_ids:
                    row.ids.append(token)
                # half a character is shown as such only where nothing comes that could make it whole
                text = self._new_text(row, added.finish is not None and place == len(added.tokens))
                if text or token not in self.end_ids:
                    row.held.append((text, depth))
            yield StreamedText(
                added.row, self._release(row, stop, added.finish), added, added.finish
            )

    def _begin(self, prompt: Sequence[int], anchor: list[int]) -> _Row:
        """Return a row without new text, which stands behind the anchor if it stands behind any text."""
        is_bare = self.tokenizer.special_ids.issuperset(prompt)
        return _Row() if is_bare else _Row(list(anchor), 0, len(anchor))

    def _new_text(self, row: _Row, is_over: bool) -> str:
        """Return the text that the newest token brings."""
        before = self.tokenizer.decode(row.ids[row.first : row.done])
        whole = self.tokenizer.decode(row.ids[row.first :])
        if (whole.endswith(BROKEN) and not is_over) or len(whole) <= len(before):
            return ""
        row.first, row.done = row.done, len(row.ids)
        return whole[len(before) :]

    def _release(self, row: _Row, stop: Sequence[str], finish: str | None) -> list[tuple[str, int]]:
        """Return the held text without what may be the beginning of a stop word, and without a whole one."""
        text = "".join(part for part, _ in row.held)
        if finish == "stop":
            # a tokenizer may write the last tokens otherwise than all of them: then nothing is cut off
            sure = min(
                (place for word in stop if (place := text.find(word)) >= 0), default=len(text)
            )
        elif finish is None and stop:
            sure = len(text) - max(
                (
                    size
                    for word in stop
                    for size in range(1, len(word))
                    if text.endswith(word[:size])
                ),
                default=0,
            )
        else:
            sure = len(text)
        parts, row.held, place = row.held, [], 0
        released = []
        for part, depth in parts:
            kept = part[: max(0, sure - place)]
            place += len(part)
            if kept or not part:
                released.append((kept, depth))
            if finish is None and kept != part:
                row.held.append((part[len(kept) :], depth))
        return released


def open_writer(
    directory: Path,
    draft: Path | None = None,
    depths: Sequence[int] | None = None,
    tokenizer: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    prompt_template: str | None = None,
) -> TextGenerator:
    """Return the model of a Hugging Face directory, or of a checkpoint, ready to write.

    Args:
        directory: The model's.
        draft: Of another model that drafts.
        depths: Exits to use instead of those the directory names.
        tokenizer: A directory or sentencepiece file, where the model has none.
        dtype: Kind of numbers.
        device: Where to.
        prompt_template: Form of conversations, instead of the one the model was trained in.

    Raises:
        CheckpointError, SettingsError, DataError: A directory, tokenizer or form cannot be used.
    """
    place = open_model_directory(directory)
    words = open_tokenizer(place, tokenizer)
    form = form_of_model(place, words, prompt_template)
    network = load_network(place, depths, dtype, device)
    form.check_rows(network.vocab_size)
    other = (
        None
        if draft is None
        else open_draft(open_model_directory(draft), network, words, tokenizer)
    )
    return TextGenerator(network, words, other, form)


def open_draft(
    directory: Path, network: Network, tokenizer: Tokenizer, option: Path | None = None
) -> Network:
    """Return a model that can draft for the network: of the same tokenizer. Vocabularies filled up to other sizes are made alike.

    Args:
        directory: The draft model's.
        network: The model that it drafts for.
        tokenizer: Of the network.
        option: Tokenizer of both, where directories have none.

    Raises:
        SettingsError: Its tokenizer gives other numbers.
    """
    draft = load_network(directory, None, network.dtype, network.device)
    own = open_tokenizer(directory, option)
    if own.vocabulary() != tokenizer.vocabulary():
        raise SettingsError(
            f"draft model: its tokenizer ({own.vocab_size} tokens) gives other numbers than the model's "
            f"({tokenizer.vocab_size}). "
            "Draft with a model of the same vocabulary."
        )
    return draft if draft.vocab_size == network.vocab_size else draft.resized(network.vocab_size)
