"""Texts on a terminal or in a file: in the colours of the exits that said them."""

from collections.abc import Sequence

from megatron_sorted.reading.shown import for_terminal

COLOURS = (208, 214, 220, 148, 78, 44, 39, 33, 99)
"""Of terminals with 256 colours, shallow to deep."""


def colour_of(depth: int, depths: Sequence[int]) -> int:
    """Returns a terminal's colour for an exit."""
    return COLOURS[round(depths.index(depth) / max(len(depths) - 1, 1) * (len(COLOURS) - 1))] if depth in depths else COLOURS[0]


class Page:
    """Shows texts as they come; of several at once each when it is over.

    On a terminal a text's control characters are shown as escapes, so that no model can clear the
    screen; into a file or pipe they are written as they are.
    """

    def __init__(self, depths: Sequence[int], in_colour: bool, on_terminal: bool = False):
        self.depths, self.in_colour, self.on_terminal = depths, in_colour, on_terminal

    def shown(self, text: str, depth: int) -> str:
        """Returns a token's text in the colour of its exit."""
        text = for_terminal(text) if self.on_terminal else text
        return f"\x1b[38;5;{colour_of(depth, self.depths)}m{text}\x1b[0m" if self.in_colour and text else text

    def legend(self) -> str:
        """Returns which colour is which exit."""
        return "exits: " + " ".join(self.shown(f"@{depth}", depth) for depth in self.depths) if self.in_colour else ""
