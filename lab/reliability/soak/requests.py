"""Requests of a soak, drawn from a finite pool, so that each text is written alone only once."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sorted.reading.json_text import parse_json

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
VOCABULARY = (
    *("once", "upon", "a", "time", "there", "was", "the", "small", "red", "cat", "it", "sat"),
    *("on", "big", "dog", "ran", "miles", "and", "did", "not", "yes", "replied", "mother"),
    *("bird", "flew", "over", "house", "sang", "then", "night", "12", "Größer", "猫"),
)
STRATEGIES = ("full", "fixed", "early_exit", "self_speculative", "sorted_speculative", "tree")
CONFIDENCES = (0.05, 0.2, 0.5, 0.9)
STOPS = ("a", "th", "e ", ".", "\n", "猫", "the cat")
MOST_TURNS = 4
NO_TOKENS, MANY_TEXTS = 7, 11
"""Numbers of the request for no tokens, and of one for more texts than are written at once."""


@dataclass(frozen=True)
class PooledRequest:
    """A request, without whether its answer is streamed: the text is the same.

    Attributes:
        path: Path of the request.
        body: The body as JSON with sorted keys.
    """

    path: str
    body: str

    @property
    def fields(self) -> dict[str, Any]:
        """Return the body's fields."""
        return parse_json(self.body, "request")

    @property
    def most_tokens(self) -> int:
        """Return the largest number of new tokens that it may get."""
        fields, prompt = self.fields, self.fields.get("prompt", "")
        many = isinstance(prompt, list) and isinstance(prompt[0], str | list)
        return fields["max_tokens"] * fields.get("n", 1) * (len(prompt) if many else 1)


def pooled(path: str, **fields: object) -> PooledRequest:
    """Return a request with these fields."""
    return PooledRequest(path, json.dumps(fields, sort_keys=True))


@dataclass(frozen=True)
class Talk:
    """A conversation that grows by the server's answers.

    Attributes:
        users: The user's turns.
        fields: Fields of each request, as JSON.
    """

    users: tuple[str, ...]
    fields: str

    def turn(self, answers: Sequence[str]) -> PooledRequest:
        """Return the request that follows these answers."""
        messages = []
        for user, answer in zip(self.users, [*answers, None], strict=False):
            messages.append({"role": "user", "content": user})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        return pooled(CHAT, messages=messages, **parse_json(self.fields, "fields"))


class Pool:
    """The requests and conversations of a soak.

    Args:
        chance: The source of randomness.
        size: Number of requests; a quarter as many conversations come with them.
        name: Name of the model.
        depths: Depths of its exits.
        context: The model's context.
    """

    def __init__(
        self, chance: random.Random, size: int, name: str, depths: Sequence[int], context: int
    ):
        self.chance, self.name, self.depths, self.context = chance, name, list(depths), context
        self.beginnings = [self._phrase(30, 60) for _ in range(4)]
        # every kind of strategy is there, also in a small pool
        choices = [self._strategy(number) for number in range(size)]
        self.requests = [self._request(number, choice) for number, choice in enumerate(choices)]
        self.talks = [self._talk(number) for number in range(max(1, size // 4))]

    def draw(self, chance: random.Random) -> PooledRequest | Talk:
        """Return a request or a conversation."""
        return chance.choice(self.talks if chance.random() < 0.2 else self.requests)

    def _phrase(self, least: int, most: int) -> str:
        return " ".join(self.chance.choices(VOCABULARY, k=self.chance.randint(least, most)))

    def _strategy(self, number: int) -> dict[str, Any]:
        kinds = [{}, *({"strategy": name} for name in STRATEGIES)]
        kinds += [{"depth": depth} for depth in self.depths]
        kinds += [{"model": f"{self.name}@{depth}"} for depth in self.depths]
        kinds += [{"confidence": confidence} for confidence in CONFIDENCES]
        kinds += [{"model": self.name, "strategy": name} for name in STRATEGIES[3:]]
        return kinds[number % len(kinds)]

    def _sampling(self) -> dict[str, Any]:
        chance = self.chance
        if chance.random() < 0.4:
            greedy = {"temperature": 0}
            return greedy | ({"repetition_penalty": 1.3} if chance.random() < 0.3 else {})
        fields = {
            "temperature": chance.choice((0.3, 0.8, 1.0, 1.5)),
            "seed": chance.getrandbits(40),
        }
        if chance.random() < 0.4:
            fields["top_p"] = chance.choice((0.5, 0.9, 0.99))
        if chance.random() < 0.4:
            fields["top_k"] = chance.choice((1, 5, 40))
        if chance.random() < 0.3:
            fields["repetition_penalty"] = chance.choice((0.9, 1.1, 1.5))
        return fields

    def _prompt(self) -> str | list:
        chance, kind = self.chance, self.chance.random()
        if kind < 0.3:
            return f"{chance.choice(self.beginnings)} {self._phrase(1, 8)}"
        if kind < 0.45:  # a long one, as tokens, whose number is then known
            length = chance.randint(self.context // 3, self.context - 80)
            return [chance.randint(3, 290) for _ in range(length)]
        if kind < 0.55:
            return [self._phrase(1, 12) for _ in range(chance.randint(2, 3))]
        return self._phrase(1, 20)

    def _request(self, number: int, choice: dict[str, Any]) -> PooledRequest:
        chance = self.chance
        most = 0 if number == NO_TOKENS else chance.choice((1, 4, 16, 16, 32, 48, 64))
        fields = {"prompt": self._prompt(), "max_tokens": most, **choice, **self._sampling()}
        if chance.random() < 0.2:
            fields["n"] = chance.randint(2, 4)
        if number == MANY_TEXTS:
            fields |= {"prompt": [self._phrase(1, 5) for _ in range(16)], "n": 8, "max_tokens": 16}
        if chance.random() < 0.3:
            fields["stop"] = chance.sample(STOPS, chance.randint(1, 3))
        if chance.random() < 0.1 and isinstance(fields["prompt"], str):
            fields["echo"] = True
        if set(choice) <= {"strategy"} and choice.get("strategy") not in ("fixed", "early_exit"):
            fields |= {"logprobs": chance.randint(0, 3)} if chance.random() < 0.2 else {}
        return pooled(COMPLETIONS, **fields)

    def _talk(self, number: int) -> Talk:
        users = tuple(self._phrase(2, 15) for _ in range(self.chance.randint(2, MOST_TURNS)))
        fields = {"max_tokens": self.chance.choice((8, 24, 40)), **self._sampling()}
        return Talk(users, json.dumps(fields | self._strategy(number)))
