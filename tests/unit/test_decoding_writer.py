"""Text comes in pieces that together are the whole: characters of several bytes, stop words, ends, exits of every token."""

import pytest

from megatron_sorted.decoding import generate as generate_module
from megatron_sorted.decoding.generate import Limits, generate
from megatron_sorted.decoding.speculation.steps import StepOutput
from megatron_sorted.decoding.strategies import Full, SelfSpeculative
from megatron_sorted.decoding.text_generator import TextGenerator, open_writer
from megatron_sorted.errors import DataError, SettingsError
from tests.support.decoding import plain_network, prompts
from tests.support.evaluated import write_model

WORDS = ["a", " b", "cc", "€"[:1], " stop", "st", "op", " the", "end", "."]


class Letters:
    """A tokenizer of 100 tokens: the words above, then single bytes of UTF-8, of which several make a character."""

    bos_id, eos_id, adds_bos, chat_templates, special_ids = 1, None, True, {}, frozenset((1,))
    vocab_size, notes = 100, ()

    def __init__(self):
        euro = "€ä".encode()
        self.pieces = [
            (WORDS * 10)[token].encode() if token % 5 else bytes([euro[token // 5 % len(euro)]])
            for token in range(100)
        ]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[] for _ in texts]  # nothing depends on what is before a text

    def encode_prompt(self, text: str) -> list[int]:
        return [1, *(ord(letter) % 100 for letter in text)]

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.pieces[token] for token in ids).decode(errors="replace")


@pytest.fixture
def writer():
    _, network = plain_network("llama")
    return TextGenerator(network, Letters())


def written(writer, texts, **more) -> tuple[list[str], list[str], list[int]]:
    found, finishes, depths = [""] * len(texts), [""] * len(texts), [0] * len(texts)
    for piece in writer.write(texts, **more):
        found[piece.row] += piece.text
        finishes[piece.row] = piece.finish
        depths[piece.row] += len(piece.parts)
    return found, finishes, depths


@pytest.mark.parametrize("strategy", [Full(), SelfSpeculative(2, 5)])
def test_pieces_are_the_whole(writer, strategy):
    texts = prompts((5, 9), 100)
    found, finishes, counts = written(writer, texts, strategy=strategy, max_new_tokens=40)
    whole = [
        writer.tokenizer.decode(text.tokens)
        for text in generate(writer.network, texts, limits=Limits(40))
    ]
    assert found == whole and finishes == ["length"] * 2 and counts == [40] * 2


@pytest.mark.parametrize("strategy", [Full(), SelfSpeculative(2, 5)])
def test_stop_words_are_left_out_wherever_they_stand(writer, strategy):
    texts = prompts((5,), 100)
    [whole], _, _ = written(writer, texts, strategy=strategy, max_new_tokens=40)
    for begin, size in ((3, 2), (10, 5), (17, 1), (25, 7)):
        word = whole[begin : begin + size]
        [found], [finish], _ = written(
            writer, texts, strategy=strategy, max_new_tokens=40, stop=["not there", word]
        )
        assert finish == "stop" and found == whole[: whole.index(word)]


class Script:
    """Steps that say what they are told to, of one text."""

    def __init__(self, steps: list[list[int]]):
        self.steps = iter(steps)

    def step(self) -> list[StepOutput]:
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
    writer, monkeypatch, steps, stop, text, finish
):
    """Several tokens of one step are one character, and the text is over with that step; or over with half a character."""
    writer.end_ids = frozenset({END})
    monkeypatch.setattr(generate_module, "make_step", lambda strategy, batch: Script(steps))
    found, finishes, _ = written(writer, [[5, 6]], max_new_tokens=6, stop=stop)
    assert (found, finishes) == ([text], [finish])


def test_a_tokenizer_that_writes_the_end_of_a_text_otherwise_does_no_harm(writer, monkeypatch):
    decode = writer.tokenizer.decode
    monkeypatch.setattr(writer.tokenizer, "decode", lambda ids: decode(ids).replace(" b b b", "Z"))
    monkeypatch.setattr(
        generate_module, "make_step", lambda strategy, batch: Script([[B], [B], [B], [DOT]])
    )
    assert written(writer, [[5, 6]], max_new_tokens=6, stop=["Z"])[:2] == ([" b b b"], ["stop"])


def test_a_text_goes_on_where_the_prompt_ends(tmp_path, monkeypatch):
    """The pieces of sentencepiece that begin a word bring the space before it, wherever the prompt ends."""
    writer = open_writer(write_model(tmp_path / "m", num_layers=2))
    whole = writer.encode("a b cd, a b")
    text = writer.tokenizer.decode(whole, skip_special_tokens=True)
    assert text == "a b cd, a b"
    for end in range(2, len(whole)):
        rest = text.removeprefix(writer.tokenizer.decode(whole[:end], skip_special_tokens=True))
        for stop in ([], [rest[:2]], [rest[-2:]]):
            monkeypatch.setattr(
                generate_module, "make_step", lambda strategy, batch, end=end: Script([whole[end:]])
            )
            [found], [finish], _ = written(
                writer, [whole[:end]], max_new_tokens=len(whole) - end, stop=stop
            )
            assert (found, finish) == (
                (rest[: rest.index(stop[0])], "stop") if stop else (rest, "length")
            )
    monkeypatch.setattr(generate_module, "make_step", lambda strategy, batch: Script([whole[1:]]))
    assert written(writer, [whole[:1]], max_new_tokens=len(whole) - 1)[0] == [text], (
        "nothing stands before it"
    )


def test_stop_words_that_mean_nothing_are_refused(writer):
    with pytest.raises(SettingsError, match="stop: a stop word is empty"):
        written(writer, [[5, 6]], stop=["a", ""])
    with pytest.raises(SettingsError, match="stop: words need to_text"):
        Limits(stop=("a",))
    with pytest.raises(SettingsError, match="max_new_tokens: -1 is not 0 or more"):
        Limits(-1)


def test_a_token_is_made_text_once_however_many_stop_words_there_are(writer):
    texts, asked = (
        [],
        Limits(
            12,
            stop=("not", "there", "at", "all"),
            to_text=lambda tokens: texts.append(len(tokens)) or "",
        ),
    )
    generate(writer.network, [[5, 6]], limits=asked)
    assert texts == list(range(1, 13))


def test_prompts_and_conversations(writer):
    assert writer.encode("ab") == [1, 97, 98]
    assert writer.encode_chat(
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    ) == [1, 97, 10, 98, 10]
    writer.tokenizer.bos_id = None
    writer.tokenizer.__class__ = type("Bare", (Letters,), {"encode_prompt": lambda self, text: []})
    with pytest.raises(DataError, match="prompt: it is empty"):
        writer.encode("")
