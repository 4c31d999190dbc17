"""The texts that the library writes alone, one request after another: what a server must write."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.reliability.soak.requests import CHAT, PooledRequest
from megatron_sorted.decoding.requested_strategy import RequestedStrategy
from megatron_sorted.decoding.strategies import (
    SPECULATIVE,
    EarlyExit,
    Fixed,
    Full,
    SamplingParameters,
    Strategy,
)
from megatron_sorted.decoding.text_generator import TextGenerator

SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")


@dataclass(frozen=True)
class Written:
    """What a request must get.

    Attributes:
        texts: (text, reason of its end) of each choice.
        num_tokens: Number of new tokens.
        depths: Number of new tokens by depth; None for strategies whose draft lengths may depend
            on the load.
    """

    texts: tuple[tuple[str, str], ...]
    num_tokens: int
    depths: dict[str, int] | None = field(default=None, compare=False)


class Alone:
    """Writes the texts of requests, each alone, and remembers them.

    Args:
        generator: The model, in the same kind of weights as the server's.
        model: The model's directory.
    """

    def __init__(self, generator: TextGenerator, model: Path):
        self.generator, self.choice = generator, RequestedStrategy(model)
        self.written: dict[PooledRequest, Written] = {}

    def of(self, request: PooledRequest) -> Written:
        """Return what a request must get."""
        if request not in self.written:
            self.written[request] = self._write(request)
        return self.written[request]

    def strategy(self, fields: dict[str, Any]) -> Strategy:
        """Return the strategy that a request asks for."""
        network = self.generator.network
        _, _, named = fields.get("model", "").rpartition("@")
        depth = fields.get("depth", int(named) if named.isdigit() else None)
        if depth is not None:
            return Full() if depth == network.num_layers else Fixed(depth)
        if (confidence := fields.get("confidence")) is not None:
            exits = network.depths[:-1]
            return EarlyExit(exits, (confidence,) * len(exits))
        return self.choice.named(fields.get("strategy", "full")).strategy(network)

    def _write(self, request: PooledRequest) -> Written:
        fields, is_chat = request.fields, request.path == CHAT
        strategy = self.strategy(fields)
        prompts = [""] if is_chat else _prompts(fields["prompt"])
        if is_chat:
            ids = [self.generator.encode_chat(fields["messages"])]
        else:
            ids = [
                self.generator.encode(prompt) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ]
        n, echo = fields.get("n", 1), fields.get("echo", False)
        texts = [prompt if echo else "" for prompt in prompts for _ in range(n)]
        ends, depths = ["length"] * len(texts), Counter()
        room = self.generator.network.max_positions - max(map(len, ids))
        pieces = self.generator.write(
            [prompt for prompt in ids for _ in range(n)],
            strategy,
            SamplingParameters(**{name: fields[name] for name in SAMPLING if name in fields}),
            min(fields["max_tokens"], room),
            fields.get("stop", ()),
        )
        for piece in pieces:
            texts[piece.row] += piece.text
            ends[piece.row] = "length" if piece.finish == "length" else "stop"
            depths.update(map(str, piece.added.depths))
        if is_chat:  # an answer does not begin with a space
            texts = [text.lstrip(" ") for text in texts]
        return Written(
            tuple(zip(texts, ends, strict=True)),
            depths.total(),
            None if isinstance(strategy, SPECULATIVE) else dict(depths),
        )


def _prompts(prompt: str | list) -> list[str | list[int]]:
    """Return the prompts of a completion, of which one may stand alone."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
