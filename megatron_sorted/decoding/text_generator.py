"""Text generation from prompts: a network with its tokenizer, stop sequences, streamed text."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_sorted.decoding.cache.capacity import as_memory_error
from megatron_sorted.decoding.cache.joined import ForwardPass
from megatron_sorted.decoding.generate import (
    Sizes,
    check_request,
    run_passes,
    sizes_that_fit,
    start_batch,
    write_batch,
)
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.speculation.steps import DecodingBatch
from megatron_sorted.decoding.strategies import SPECULATIVE, Full, SamplingParameters, Strategy
from megatron_sorted.decoding.texts import AddedTokens, GenerationRequest, Limits
from megatron_sorted.errors import DataError
from megatron_sorted.exported.generation_defaults import GenerationDefaults
from megatron_sorted.text.tokenizer.contract import Tokenizer
from megatron_sorted.text.tokenizer.fit import surplus_line

BROKEN = "\ufffd"
"""What a tokenizer decodes the bytes of an incomplete character to."""
ANCHOR = "a"
"""Text before new text when it is decoded: some tokenizers drop the space before a first word."""


@dataclass
class StreamedText:
    """The newest part of one text.

    Attributes:
        row: Number of the prompt.
        parts: (text, exit) of every token. The text of a token that ends inside a character, or may
            start a stop sequence, comes with a later token.
        added: The tokens.
        finish: Why the text ended; None while it continues.
    """

    row: int
    parts: list[tuple[str, int]]
    added: AddedTokens
    finish: str | None

    @property
    def text(self) -> str:
        """Return the new text."""
        return "".join(text for text, _ in self.parts)


@dataclass
class _Row:
    """The state of decoding one row's tokens to text.

    Attributes:
        ids: Tokens of the anchor, then the new ones.
        first: Index of the first token that is decoded again with new ones: a tokenizer may write a
            token differently after another.
        done: Number of tokens whose text is complete.
        held: (text, exit) of tokens that are not yielded yet: a stop sequence may start there.
    """

    ids: list[int] = field(default_factory=list)
    first: int = 0
    done: int = 0
    held: list[tuple[str, int]] = field(default_factory=list)


class TextGenerator:
    """A model with its tokenizer that continues texts and answers conversations.

    Args:
        network: The model.
        tokenizer: The model's tokenizer.
        draft: Another model that drafts; None without one.
        form: The form of conversations; by default the messages' contents, one per line, as before
            version 0.7.

    Raises:
        DataError: An end token is not in the model's vocabulary, or the tokenizer belongs to
            another model.
    """

    def __init__(
        self,
        network: Network,
        tokenizer: Tokenizer,
        draft: Network | None = None,
        form: GenerationDefaults | None = None,
    ):
        self.network, self.tokenizer, self.draft = network, tokenizer, draft
        self.form = form = form or GenerationDefaults()
        self.end_ids = form.end_ids_of(network.model, tokenizer)
        line = surplus_line(tokenizer, network.vocab_size, "--tokenizer")
        self.notes = tokenizer.notes if line is None else (*tokenizer.notes, line)

    def draft_for(self, strategy: Strategy | type[Strategy] | None) -> Network | None:
        """Return the other model that drafts; None for strategies that draft nothing."""
        kind = strategy if isinstance(strategy, type) else type(strategy)
        return self.draft if issubclass(kind, SPECULATIVE) else None

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a prompt with the tokenizer's prefix; for an empty prompt, bos.

        Raises:
            DataError: The prompt is empty, and the tokenizer has no bos.
        """
        ids = self.tokenizer.encode_prompt(text)
        if not ids and self.tokenizer.bos_id is not None:
            ids = [self.tokenizer.bos_id]
        if not ids:
            raise DataError(
                "prompt: it is empty, and the tokenizer puts nothing before a text. Write a prompt."
            )
        return ids

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Return the tokens of a conversation up to where the assistant's answer starts.

        Args:
            messages: The conversation, [{"role": ..., "content": ...}].
            tools: Tools for the chat template.

        Raises:
            DataError: The form does not accept these messages.
        """
        form = self.form.prompt_form
        if form is None or not form.is_conversation:
            return self.encode("".join(f"{message['content']}\n" for message in messages))
        return self.tokenizer.encode_rendered(form.render(messages, tools))

    @torch.inference_mode()
    def write(
        self,
        prompts: Sequence[Sequence[int]],
        strategy: Strategy | None = None,
        sampling: SamplingParameters | None = None,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
    ) -> Iterator[StreamedText]:
        """Yield the continuations of prompts as they are generated, without stop sequences.

        Args:
            prompts: Tokens of each prompt.
            strategy: The decoding strategy; `Full` by default.
            sampling: How tokens are chosen; greedy by default.
            max_new_tokens: Maximum number of new tokens of a text.
            stop: Stop sequences.

        Raises:
            SettingsError, DataError, MemoryExhaustedError: See ``generate.stream``.
        """
        request = GenerationRequest(
            prompts, strategy or Full(), sampling or SamplingParameters(), max_new_tokens, stop
        )
        sizes = None
        with as_memory_error():
            if prompts and max_new_tokens > 0:
                draft = self.draft_for(request.strategy)
                sizes = sizes_that_fit(self.network, request, draft)
            yield from run_passes(self.writing(request, sizes))

    def writing(
        self,
        request: GenerationRequest,
        sizes: Sizes | None = None,
        begun: Callable[[DecodingBatch], None] = lambda _: None,
    ) -> Generator[ForwardPass | StreamedText, Tensor | None, None]:
        """Yield the passes that texts need, whose logits are sent, and their new parts.

        Args:
            request: The texts.
            sizes: The memory for them; by default what they need alone.
            begun: Called with the batch before its first pass.

        Raises:
            SettingsError, DataError, MemoryExhaustedError: See ``generate.stream``.
        """
        draft, stop = self.draft_for(request.strategy), request.stop
        check_request(request, self.network, draft)
        limits = self.limits(request.max_new_tokens, stop)
        if request.max_new_tokens < 1:
            return
        anchor = self.tokenizer.encode_batch([ANCHOR])[0]
        rows = {
            row: self._begin(prompt, anchor)
            for row, prompt in zip(request.rows, request.prompts, strict=True)
        }
        batch = start_batch(self.network, request, draft, sizes)
        begun(batch)
        writing, logits = write_batch(batch, request, limits), None
        while True:
            try:
                output = writing.send(logits)
            except StopIteration:
                return
            if isinstance(output, ForwardPass):
                logits = yield output
            else:
                logits = None
                yield self._streamed(rows[output.row], output, stop)

    def limits(self, max_new_tokens: int, stop: Sequence[str]) -> Limits:
        """Return the limits of a text: its end tokens, its length, its stop sequences."""
        anchor = self.tokenizer.encode_batch([ANCHOR])[0]
        longest, before = max(map(len, stop), default=0), len(self.tokenizer.decode(anchor))

        def tail(tokens: list[int]) -> str:  # a character takes at most four tokens
            return self.tokenizer.decode([*anchor, *tokens[-(4 * longest + 8) :]])[before:]

        return Limits(max_new_tokens, self.end_ids, tuple(stop), tail)

    def _streamed(self, row: _Row, added: AddedTokens, stop: Sequence[str]) -> StreamedText:
        """Return the text of new tokens."""
        for count, (token, depth) in enumerate(zip(added.tokens, added.depths, strict=True), 1):
            if token not in self.end_ids:
                row.ids.append(token)
            # an incomplete character is shown only at the end, where no token can complete it
            text = self._new_text(row, added.finish is not None and count == len(added.tokens))
            if text or token not in self.end_ids:
                row.held.append((text, depth))
        return StreamedText(added.row, self._release(row, stop, added.finish), added, added.finish)

    def _begin(self, prompt: Sequence[int], anchor: list[int]) -> _Row:
        """Return a row without new text; it starts with the anchor if the prompt has any text."""
        is_bare = self.tokenizer.special_ids.issuperset(prompt)
        return _Row() if is_bare else _Row(list(anchor), 0, len(anchor))

    def _new_text(self, row: _Row, is_over: bool) -> str:
        """Return the text that the newest token adds."""
        before = self.tokenizer.decode(row.ids[row.first : row.done])
        whole = self.tokenizer.decode(row.ids[row.first :])
        if (whole.endswith(BROKEN) and not is_over) or len(whole) <= len(before):
            return ""
        row.first, row.done = row.done, len(row.ids)
        return whole[len(before) :]

    def _release(self, row: _Row, stop: Sequence[str], finish: str | None) -> list[tuple[str, int]]:
        """Return the held text up to a stop sequence, or up to what may be the start of one."""
        text = "".join(part for part, _ in row.held)
        end = len(text)
        if finish == "stop":
            # a tokenizer may decode the last tokens differently from all: then no stop is in text
            starts = (start for one in stop if (start := text.find(one)) >= 0)
            end = min(starts, default=end)
        elif finish is None:
            sizes = (
                size for one in stop for size in range(1, len(one)) if text.endswith(one[:size])
            )
            end -= max(sizes, default=0)
        parts, row.held, start = row.held, [], 0
        released = []
        for part, depth in parts:
            kept = part[: max(0, end - start)]
            start += len(part)
            if kept or not part:
                released.append((kept, depth))
            if finish is None and kept != part:
                row.held.append((part[len(kept) :], depth))
        return released
