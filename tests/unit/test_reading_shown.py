"""Names from outside in messages: none can clear a screen or write a line of its own."""

import os
from pathlib import Path

import pytest

from megatron_sorted.decoding.terminal import TokenFormat
from megatron_sorted.reading.shown import for_terminal, one_line, printable, shown

NASTY = "a\x1b[2J\rb\nerror: forged\u202e\u2028\x07\x9b1m"
HARMLESS = r"a\x1b[2J\rb\nerror: forged\u202e\u2028\x07\x9b1m"


@pytest.mark.parametrize("name", [NASTY, Path(NASTY), NASTY.encode().decode()])
def test_control_characters_are_escaped(name):
    assert shown(name) == one_line(NASTY) == HARMLESS


def test_text_of_any_language_stays_and_long_names_are_cut():
    assert (
        shown("größer 你好 مرحبا 🙂 \\x1b") == "größer 你好 مرحبا 🙂 \\x1b"
        and shown(5) == "5"
        and shown(None) == "None"
    )
    assert shown("x" * 301) == "x" * 300 + "..." and shown("abc", 2) == "ab..."
    assert (
        shown(os.fsdecode(b"a\xff")) == r"a\udcff"
        and shown(Path(os.fsdecode(b"\xff"))) == r"\udcff"
    )


def test_line_feeds_of_messages_stay():
    assert printable("a\tb\n\x1b[0m\rc\n") == "a\tb\n\\x1b[0m\\rc\n"


def test_a_models_text_on_a_terminal():
    assert (
        for_terminal("a\n\tb\r\x1b]0;title\x07\u200d\u202b\x9b")
        == "a\n\tb\\r\\x1b]0;title\\x07\u200d\u202b\\x9b"
    )
    assert TokenFormat([2], in_colour=False, on_terminal=True).shown("\x1b[2J", 2) == "\\x1b[2J"
    assert TokenFormat([2], in_colour=False).shown("\x1b[2J", 2) == "\x1b[2J"
    assert (
        TokenFormat([2], in_colour=True, on_terminal=True).shown("\x1b", 2).count("\x1b") == 2
    )  # the two of ours
