"""Texts and conversations on a terminal or in a file: as they come, in the colours of the exits that said them."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sorted.decoding.strategies import SamplingParameters, Strategy
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.errors import DataError
from megatron_sorted.reading.shown import for_terminal
from megatron_sorted.text.prompt_form import ALPACA, PLAIN

DEFAULT_TOKENS = 128
"""New tokens of a text at most, where nobody says and the context has room for them."""

COLOURS = (208, 214, 220, 148, 78, 44, 39, 33, 99)
"""Of terminals with 256 colours, shallow to deep."""


def colour_of(depth: int, depths: Sequence[int]) -> int:
    """Return a terminal's colour for an exit."""
    return (
        COLOURS[round(depths.index(depth) / max(len(depths) - 1, 1) * (len(COLOURS) - 1))]
        if depth in depths
        else COLOURS[0]
    )


class Page:
    """Show texts as they come; of several at once each when it is over.

    On a terminal a text's control characters are shown as escapes, so that no model can clear the
    screen; into a file or pipe they are written as they are.
    """

    def __init__(self, depths: Sequence[int], in_colour: bool, on_terminal: bool = False):
        self.depths, self.in_colour, self.on_terminal = depths, in_colour, on_terminal

    def shown(self, text: str, depth: int) -> str:
        """Return a token's text in the colour of its exit."""
        text = for_terminal(text) if self.on_terminal else text
        return (
            f"\x1b[38;5;{colour_of(depth, self.depths)}m{text}\x1b[0m"
            if self.in_colour and text
            else text
        )

    def legend(self) -> str:
        """Return which colour is which exit."""
        return (
            "exits: " + " ".join(self.shown(f"@{depth}", depth) for depth in self.depths)
            if self.in_colour
            else ""
        )


@dataclass(frozen=True)
class Console:
    """A model that writes to a terminal, or to a file.

    Attributes:
        writer: The model.
        way: How it decodes.
        sampling: How tokens are chosen.
        page: What shows the texts.
        max_new_tokens: New tokens of a text at most; None for what is usual.
        stop: Words after which a text is over.
    """

    writer: TextGenerator
    strategy: Strategy
    sampling: SamplingParameters
    page: Page
    max_new_tokens: int | None = None
    stop: Sequence[str] = ()

    def write(self, prompts: Sequence[str], ids: list[list[int]]) -> list[str]:
        """Show what comes to prompts, given as texts and as tokens, and what it took; return what was added to each."""
        began, texts, shown = time.perf_counter(), [""] * len(ids), [""] * len(ids)
        tokens = steps = drafted = accepted = 0
        by_depth: dict[int, int] = {}
        for piece in self.writer.write(
            ids, self.strategy, self.sampling, self._new_tokens(ids), self.stop
        ):
            texts[piece.row] += piece.text
            new = "".join(self.page.shown(*part) for part in piece.parts)
            shown[piece.row] += new
            if len(ids) == 1:
                print(new, end="", flush=True)
            tokens, steps = tokens + len(piece.added.tokens), steps + 1
            drafted, accepted = (
                drafted + piece.added.num_drafted,
                accepted + piece.added.num_accepted,
            )
            for depth in piece.added.depths:
                by_depth[depth] = by_depth.get(depth, 0) + 1
            if piece.finish and len(ids) > 1:
                print(
                    f"--- prompt {piece.row}: {prompts[piece.row]!r}\n{shown[piece.row]}",
                    flush=True,
                )
        took = time.perf_counter() - began
        spread = ", ".join(
            f"@{depth} {100 * count / tokens:.0f} %" for depth, count in sorted(by_depth.items())
        )
        line = f"{tokens} tokens in {took:.1f} s, {tokens / took:.1f} tokens/s; said by {spread}"
        if drafted:
            line += f"; {tokens / steps:.2f} tokens a verification, {100 * accepted / drafted:.0f} % of drafts accepted"
        print(
            ("\n" if len(ids) == 1 else "") + f"[{self.strategy.name}: {line}]",
            file=sys.stderr,
            flush=True,
        )
        return texts

    def chat(self) -> None:
        """Hold a conversation until an empty line or the end of input."""
        messages: list[dict[str, str]] = []
        while True:
            try:
                said = input("you> ").strip()
            except EOFError:
                return
            except UnicodeDecodeError as error:
                raise DataError(f"standard input: {error}. Write in UTF-8.") from error
            if not said:
                return
            messages.append({"role": "user", "content": said})
            try:
                [answer] = self.write([said], [self.writer.encode_chat(messages)])
            except DataError as error:
                print(f"error: {error} The conversation begins anew.", file=sys.stderr)
                messages.clear()
                continue
            form = self.writer.form.prompt_form  # a template puts its own blanks around an answer
            messages.append(
                {
                    "role": "assistant",
                    "content": answer
                    if form and form.name in (PLAIN, ALPACA)
                    else answer.strip(" "),
                }
            )

    def _new_tokens(self, ids: list[list[int]]) -> int:
        """Return how many tokens are written at most; the default is cut to what the context leaves, with a word about it."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        positions = self.writer.network.max_positions
        room = positions - max(map(len, ids))
        if 1 <= room < DEFAULT_TOKENS:
            print(
                f"[the context of {positions} tokens leaves room for {room} new ones, not {DEFAULT_TOKENS}]",
                file=sys.stderr,
                flush=True,
            )
            return room
        return DEFAULT_TOKENS
