"""Generated texts and conversations on a terminal or in a file, with tokens coloured by exit."""

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
"""Maximum number of new tokens, unless the user gives another or the context is too short."""

COLOURS = (208, 214, 220, 148, 78, 44, 39, 33, 99)
"""Colours of exits from shallow to deep, as numbers of a 256-colour terminal."""


def colour_of(depth: int, depths: Sequence[int]) -> int:
    """Return the terminal colour of an exit.

    >>> colour_of(4, (4, 8, 12)), colour_of(12, (4, 8, 12))
    (208, 99)
    """
    if depth not in depths:
        return COLOURS[0]
    return COLOURS[round(depths.index(depth) / max(len(depths) - 1, 1) * (len(COLOURS) - 1))]


class TokenFormat:
    """How tokens are written: coloured by exit or plain, for a terminal or a file.

    On a terminal the control characters of a text are shown as escapes, so that no model can clear
    the screen; into a file or pipe they are written as they are.

    Args:
        depths: Exits of the model.
        in_colour: Whether to colour tokens by exit.
        on_terminal: Whether the output is a terminal.
    """

    def __init__(self, depths: Sequence[int], in_colour: bool, on_terminal: bool = False):
        self.depths, self.in_colour, self.on_terminal = depths, in_colour, on_terminal

    def shown(self, text: str, depth: int) -> str:
        """Return a token's text, in the colour of its exit if colours are on."""
        text = for_terminal(text) if self.on_terminal else text
        return (
            f"\x1b[38;5;{colour_of(depth, self.depths)}m{text}\x1b[0m"
            if self.in_colour and text
            else text
        )

    def legend(self) -> str:
        """Return the legend of the exits' colours; an empty text without colours."""
        return (
            "exits: " + " ".join(self.shown(f"@{depth}", depth) for depth in self.depths)
            if self.in_colour
            else ""
        )


@dataclass(frozen=True)
class Console:
    """A text generator whose output goes to standard output.

    Attributes:
        generator: The model with its tokenizer.
        strategy: The decoding strategy.
        sampling: How tokens are chosen.
        token_format: How tokens are written.
        max_new_tokens: Maximum number of new tokens of a text; None for the default.
        stop: Stop sequences.
    """

    generator: TextGenerator
    strategy: Strategy
    sampling: SamplingParameters
    token_format: TokenFormat
    max_new_tokens: int | None = None
    stop: Sequence[str] = ()

    def write(self, prompts: Sequence[str], ids: list[list[int]]) -> list[str]:
        """Generate and print continuations, then print the speed to standard error.

        A single text is printed token by token; several are printed each when it ends.

        Args:
            prompts: The prompts as texts.
            ids: The same prompts as tokens.

        Returns:
            The continuation of each prompt.
        """
        began, texts, shown = time.perf_counter(), [""] * len(ids), [""] * len(ids)
        tokens = steps = drafted = accepted = 0
        by_depth: dict[int, int] = {}
        for new in self.generator.write(
            ids, self.strategy, self.sampling, self._new_tokens(ids), self.stop
        ):
            texts[new.row] += new.text
            formatted = "".join(self.token_format.shown(*part) for part in new.parts)
            shown[new.row] += formatted
            if len(ids) == 1:
                print(formatted, end="", flush=True)
            elif new.finish:
                print(f"--- prompt {new.row}: {prompts[new.row]!r}\n{shown[new.row]}", flush=True)
            tokens, steps = tokens + len(new.added.tokens), steps + 1
            drafted, accepted = drafted + new.added.num_drafted, accepted + new.added.num_accepted
            for depth in new.added.depths:
                by_depth[depth] = by_depth.get(depth, 0) + 1
        seconds = time.perf_counter() - began
        shares = ", ".join(
            f"@{depth} {100 * count / tokens:.0f} %" for depth, count in sorted(by_depth.items())
        )
        line = (
            f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s; "
            f"tokens by exit: {shares}"
        )
        if drafted:
            line += (
                f"; {tokens / steps:.2f} tokens per verification, "
                f"{100 * accepted / drafted:.0f} % of drafted tokens accepted"
            )
        print(
            ("\n" if len(ids) == 1 else "") + f"[{self.strategy.name}: {line}]",
            file=sys.stderr,
            flush=True,
        )
        return texts

    def chat(self) -> None:
        """Hold a conversation on standard input until an empty line or the end of input."""
        messages: list[dict[str, str]] = []
        while True:
            try:
                question = input("you> ").strip()
            except EOFError:
                return
            except UnicodeDecodeError as error:
                raise DataError(f"standard input: {error}. Write in UTF-8.") from error
            if not question:
                return
            messages.append({"role": "user", "content": question})
            try:
                [answer] = self.write([question], [self.generator.encode_chat(messages)])
            except DataError as error:
                print(f"error: {error} The conversation starts over.", file=sys.stderr)
                messages.clear()
                continue
            form = self.generator.form.prompt_form
            if not form or form.name not in (PLAIN, ALPACA):
                answer = answer.strip(" ")  # a chat template adds its own blanks around an answer
            messages.append({"role": "assistant", "content": answer})

    def _new_tokens(self, ids: list[list[int]]) -> int:
        """Return the maximum number of new tokens; print a note if the context shortens it."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        positions = self.generator.network.max_positions
        left = positions - max(map(len, ids))
        if not 1 <= left < DEFAULT_TOKENS:
            return DEFAULT_TOKENS
        print(
            f"[the context of {positions} tokens leaves {left} for new ones instead of "
            f"{DEFAULT_TOKENS}]",
            file=sys.stderr,
            flush=True,
        )
        return left
