"""Text comes in pieces that together are the whole: characters of several bytes, stop words, ends, exits of every token."""

import pytest

from megatron_sorted.decoding.generate import Limits, generate
from megatron_sorted.decoding.ways import Full, SelfSpeculative
from megatron_sorted.decoding.writer import Writer
from megatron_sorted.errors import DataError
from tests.support.decoding import plain_network, prompts

WORDS = ["a", " b", "cc", "€"[:1], " stop", "st", "op", " the", "end", "."]


class Letters:
    """A tokenizer of 100 tokens: the words above, then single bytes of UTF-8, of which several make a character."""

    bos_token_id, eos_token_id, chat_template = 1, None, None

    def __init__(self):
        euro = "€ä".encode()
        self.pieces = [(WORDS * 10)[token].encode() if token % 5 else bytes([euro[token // 5 % len(euro)]]) for token in range(100)]

    def __call__(self, text: str) -> dict:
        return {"input_ids": [1, *(ord(letter) % 100 for letter in text)]}

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.pieces[token] for token in ids).decode(errors="replace")


@pytest.fixture
def writer():
    _, network = plain_network("llama")
    return Writer(network, Letters())


def written(writer, texts, **more) -> tuple[list[str], list[str], list[int]]:
    found, finishes, depths = [""] * len(texts), [""] * len(texts), [0] * len(texts)
    for piece in writer.write(texts, **more):
        found[piece.row] += piece.text
        finishes[piece.row] = piece.finish
        depths[piece.row] += len(piece.parts)
    return found, finishes, depths


@pytest.mark.parametrize("way", [Full(), SelfSpeculative(2, 5)])
def test_pieces_are_the_whole(writer, way):
    texts = prompts((5, 9), 100)
    found, finishes, counts = written(writer, texts, way=way, max_new_tokens=40)
    whole = [writer.tokenizer.decode(text.tokens) for text in generate(writer.network, texts, limits=Limits(40))]
    assert found == whole and finishes == ["length"] * 2 and counts == [40] * 2


@pytest.mark.parametrize("way", [Full(), SelfSpeculative(2, 5)])
def test_stop_words_are_left_out_wherever_they_stand(writer, way):
    texts = prompts((5,), 100)
    [whole], _, _ = written(writer, texts, way=way, max_new_tokens=40)
    for begin, size in ((3, 2), (10, 5), (17, 1), (25, 7)):
        word = whole[begin : begin + size]
        [found], [finish], _ = written(writer, texts, way=way, max_new_tokens=40, stop=["not there", word])
        assert finish == "stop" and found == whole[: whole.index(word)]


def test_prompts_and_conversations(writer):
    assert writer.encode("ab") == [1, 97, 98]
    assert writer.encode_chat([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]) == [1, 97, 10, 98, 10]
    writer.tokenizer.bos_token_id = None
    writer.tokenizer.__class__ = type("Bare", (Letters,), {"__call__": lambda self, text: {"input_ids": []}})
    with pytest.raises(DataError, match="prompt: it is empty"):
        writer.encode("")
