"""Streamed text adds up to the whole: characters of several bytes, stop sequences, ends, exits."""

import pytest

from megatron_sorted.decoding import generate as generate_module
from megatron_sorted.decoding.generate import generate
from megatron_sorted.decoding.open_model import open_text_generator
from megatron_sorted.decoding.speculation.steps import StepOutput, Steps
from megatron_sorted.decoding.strategies import Full, SelfSpeculative
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.decoding.texts import Limits
from megatron_sorted.errors import DataError, SettingsError
from tests.support.decoding import plain_network, prompts
from tests.support.evaluated import write_model

TEXTS = ["a", " b", "cc", "€"[:1], " stop", "st", "op", " the", "end", "."]


class Letters:
    """A tokenizer of 100 tokens: the texts above, and single bytes of characters in UTF-8."""

    bos_id, eos_id, adds_bos, chat_templates, special_ids = 1, None, True, {}, frozenset((1,))
    vocab_size, notes = 100, ()

    def __init__(self):
        euro = "€ä".encode()
        self.pieces = [
            (TEXTS * 10)[token].encode() if token % 5 else bytes([euro[token // 5 % len(euro)]])
            for token in range(100)
        ]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[] for _ in texts]  # its texts do not depend on what is before them

    def encode_prompt(self, text: str) -> list[int]:
        return [1, *(ord(letter) % 100 for letter in text)]

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.pieces[token] for token in ids).decode(errors="replace")


@pytest.fixture
def generator():
    _, network = plain_network("llama")
    return TextGenerator(network, Letters())


def written(generator, texts, **more) -> tuple[list[str], list[str], list[int]]:
    whole, finishes, counts = [""] * len(texts), [""] * len(texts), [0] * len(texts)
    for new in generator.write(texts, **more):
        whole[new.row] += new.text
        finishes[new.row] = new.finish
        counts[new.row] += len(new.parts)
    return whole, finishes, counts


@pytest.mark.parametrize("strategy", [Full(), SelfSpeculative(2, 5)])
def test_streamed_parts_are_the_whole(generator, strategy):
    texts = prompts((5, 9), 100)
    streamed, finishes, counts = written(generator, texts, strategy=strategy, max_new_tokens=40)
    whole = [
        generator.tokenizer.decode(text.tokens)
        for text in generate(generator.network, texts, limits=Limits(40))
    ]
    assert streamed == whole and finishes == ["length"] * 2 and counts == [40] * 2


@pytest.mark.parametrize("strategy", [Full(), SelfSpeculative(2, 5)])
def test_stop_sequences_are_left_out_wherever_they_are(generator, strategy):
    texts = prompts((5,), 100)
    [whole], _, _ = written(generator, texts, strategy=strategy, max_new_tokens=40)
    for begin, size in ((3, 2), (10, 5), (17, 1), (25, 7)):
        stop = whole[begin : begin + size]
        [text], [finish], _ = written(
            generator, texts, strategy=strategy, max_new_tokens=40, stop=["not there", stop]
        )
        assert finish == "stop" and text == whole[: whole.index(stop)]


class Script:
    """Steps that return given tokens for one text."""

    def __init__(self, steps: list[list[int]]):
        self.steps = iter(steps)

    def passes(self) -> Steps:
        yield from ()
        tokens = next(self.steps)
        return [StepOutput(tokens, [4] * len(tokens))]


EURO, A_UMLAUT, END, DOT, B = [0, 5, 10], [15, 20], 99, 9, 1
"""Tokens of `Letters`: bytes of a character, and others."""


@pytest.mark.parametrize(
    ("steps", "stop", "text", "finish"),
    [
        ([[B, *EURO, *A_UMLAUT]], [], " b€ä", "length"),
        ([[B], [*EURO, DOT, B]], [], " b€. b", "length"),
        ([[B, *EURO, END]], [], " b€", "eos"),
        ([[B, 0], [5, 10, END]], [], " b€", "eos"),
        ([[B, *EURO, DOT]], ["€"], " b", "stop"),
        ([[B, *A_UMLAUT, *EURO]], ["ä€"], " b", "stop"),
        ([[B, 0], [5, 10, DOT]], ["€."], " b", "stop"),
        ([[B, 0], [5, END]], [], " b\ufffd", "eos"),
        ([[B, 0], [END]], ["c"], " b\ufffd", "eos"),
        ([[B, B, B, B, B, 0]], [], " b" * 5 + "\ufffd", "length"),
        ([[B, DOT], [END]], [". c", ". d"], " b.", "eos"),
    ],
)
def test_characters_that_end_with_their_text_are_whole(
    generator, monkeypatch, steps, stop, text, finish
):
    """One step completes a character and ends the text, or the text ends inside a character."""
    generator.end_ids = frozenset({END})
    monkeypatch.setattr(generate_module, "make_step", lambda strategy, batch: Script(steps))
    texts, finishes, _ = written(generator, [[5, 6]], max_new_tokens=6, stop=stop)
    assert (texts, finishes) == ([text], [finish])


def test_a_tokenizer_may_decode_the_end_of_a_text_differently(generator, monkeypatch):
    decode = generator.tokenizer.decode
    monkeypatch.setattr(
        generator.tokenizer, "decode", lambda ids: decode(ids).replace(" b b b", "Z")
    )
    monkeypatch.setattr(
        generate_module, "make_step", lambda strategy, batch: Script([[B], [B], [B], [DOT]])
    )
    assert written(generator, [[5, 6]], max_new_tokens=6, stop=["Z"])[:2] == ([" b b b"], ["stop"])


def test_a_text_continues_where_the_prompt_ends(tmp_path, monkeypatch):
    """Tokens of sentencepiece that begin a word bring the space before it after any prompt."""
    generator = open_text_generator(write_model(tmp_path / "m", num_layers=2))
    whole = generator.encode("a b cd, a b")
    text = generator.tokenizer.decode(whole, skip_special_tokens=True)
    assert text == "a b cd, a b"
    for end in range(2, len(whole)):
        rest = text.removeprefix(generator.tokenizer.decode(whole[:end], skip_special_tokens=True))
        for stop in ([], [rest[:2]], [rest[-2:]]):
            monkeypatch.setattr(
                generate_module, "make_step", lambda strategy, batch, end=end: Script([whole[end:]])
            )
            [new], [finish], _ = written(
                generator, [whole[:end]], max_new_tokens=len(whole) - end, stop=stop
            )
            assert (new, finish) == (
                (rest[: rest.index(stop[0])], "stop") if stop else (rest, "length")
            )
    monkeypatch.setattr(generate_module, "make_step", lambda strategy, batch: Script([whole[1:]]))
    assert written(generator, [whole[:1]], max_new_tokens=len(whole) - 1)[0] == [text], (
        "nothing stands before it"
    )


def test_limits_that_make_no_sense_are_refused(generator):
    with pytest.raises(SettingsError, match="stop: a stop sequence is empty"):
        written(generator, [[5, 6]], stop=["a", ""])
    with pytest.raises(SettingsError, match="stop: stop sequences need to_text"):
        Limits(stop=("a",))
    with pytest.raises(SettingsError, match="max_new_tokens: -1 is not 0 or more"):
        Limits(-1)


def test_a_token_is_decoded_once_for_any_number_of_stop_sequences(generator):
    decoded = []
    limits = Limits(
        12,
        stop=("not", "there", "at", "all"),
        to_text=lambda tokens: decoded.append(len(tokens)) or "",
    )
    generate(generator.network, [[5, 6]], limits=limits)
    assert decoded == list(range(1, 13))


def test_prompts_and_conversations(generator):
    assert generator.encode("ab") == [1, 97, 98]
    assert generator.encode_chat(
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    ) == [1, 97, 10, 98, 10]
    generator.tokenizer.bos_id = None
    generator.tokenizer.__class__ = type(
        "Bare", (Letters,), {"encode_prompt": lambda self, text: []}
    )
    with pytest.raises(DataError, match="prompt: it is empty"):
        generator.encode("")
