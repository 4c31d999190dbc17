"""The prompts of requests: their forms, and their tokens within a bounded time."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.errors import DataError
from megatron_sorted.serving.answers import RefusedError
from megatron_sorted.serving.requests import excerpt

PROBED_CHARACTERS = 8
"""Characters per token of the context; of a longer text the beginning is encoded first.

That mostly shows, at a bounded cost, that the text is too long.
"""
MANY_CHARACTERS = 20_000
"""The length from which texts are encoded in a thread, while others are served."""
CHARACTERS_PER_TURN = 100
"""About what a chat template writes around a turn."""


def read_prompts(
    value: object, most_prompts: int, max_positions: int, vocab_size: int
) -> list[str | list[int]]:
    """Return the prompts, each a text or its tokens.

    OpenAI allows four forms: a text, a list of texts, a list of tokens, a list of such lists.

    Raises:
        RefusedError: The value has none of these forms, or cannot fit the model.
    """
    if isinstance(value, str):
        return [value]
    rule = "Give a text, a list of texts, a list of tokens or a list of such lists."
    if not isinstance(value, list):
        raise RefusedError(
            f"prompt: {excerpt(value)} is a {type(value).__name__}. {rule}", "prompt"
        )
    if not value:
        raise RefusedError(f"prompt: the list is empty. {rule}", "prompt")
    if type(value[0]) is int:
        return [_check_tokens(value, "prompt", max_positions, vocab_size)]
    if len(value) > most_prompts:
        raise RefusedError(
            f"prompt: {len(value)} prompts are more than {most_prompts} in one request. "
            "Send fewer.",
            "prompt",
        )
    if all(isinstance(one, str) for one in value):
        return value
    for index, one in enumerate(value):
        if not isinstance(one, list):
            raise RefusedError(
                f"prompt.{index}: {excerpt(one)} is a {type(one).__name__}. {rule}",
                f"prompt.{index}",
            )
    return [
        _check_tokens(one, f"prompt.{index}", max_positions, vocab_size)
        for index, one in enumerate(value)
    ]


def _check_tokens(value: list, field: str, max_positions: int, vocab_size: int) -> list[int]:
    """Return the tokens of one prompt, their number checked first to bound the cost."""
    if not value:
        raise RefusedError(
            f"{field}: it has no tokens. Give at least one, such as the tokenizer's bos.", field
        )
    if len(value) > max_positions:
        raise RefusedError(
            f"{field}: {len(value)} tokens are more than the model's context of {max_positions}. "
            "Shorten it.",
            field,
        )
    for token in value:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise RefusedError(
                f"{field}: {excerpt(token)} is not a token in 0..{vocab_size - 1}. "
                "Use the model's own tokenizer.",
                field,
            )
    return value


class PromptEncoder:
    """Turns prompts and conversations into tokens; long ones in a thread, one at a time.

    Args:
        generator: The model and its tokenizer.
    """

    def __init__(self, generator: TextGenerator):
        self.generator, self.most_tokens = generator, generator.network.max_positions
        self.thread_is_free = asyncio.Lock()

    async def encode(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Return the tokens of each prompt.

        Raises:
            RefusedError: A prompt has none, or more than fit into the model's context.
        """
        return await self._encoded(
            sum(len(prompt) for prompt in prompts if isinstance(prompt, str)),
            lambda: [
                self._tokens_of(prompt, "prompt", self.generator.encode)
                if isinstance(prompt, str)
                else prompt
                for prompt in prompts
            ],
        )

    async def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[list[int]]:
        """Return the tokens of a conversation, as a list of one prompt.

        Raises:
            RefusedError: The model's form does not accept it, or it is too long.
        """
        contents = "\n".join(message["content"] for message in messages)

        def encode(text: str) -> list[int]:
            # the check of a long text encodes its beginning alone, without the template
            if text is contents:
                return self.generator.encode_chat(messages)
            return self.generator.encode(text)

        return await self._encoded(
            len(contents) + CHARACTERS_PER_TURN * len(messages),
            lambda: [self._tokens_of(contents, "messages", encode)],
        )

    async def _encoded(
        self, num_characters: int, work: Callable[[], list[list[int]]]
    ) -> list[list[int]]:
        if num_characters < MANY_CHARACTERS:
            return work()
        async with self.thread_is_free:
            return await asyncio.to_thread(work)

    def _tokens_of(self, text: str, field: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Return the tokens of a text; refuse a far too long one after encoding its beginning."""
        most_tokens = self.most_tokens
        most_characters = PROBED_CHARACTERS * (most_tokens + 1)
        try:
            if (
                len(text) > most_characters
                and (count := len(encode(text[:most_characters]))) > most_tokens + 1
            ):
                raise RefusedError(
                    f"{field}: {len(text)} characters, of which the first {most_characters} alone "
                    f"are {count} tokens, are more than the model's context of {most_tokens} "
                    "tokens. Shorten it.",
                    field,
                )
            ids = encode(text)
        except DataError as error:
            raise RefusedError(str(error), field) from error
        if len(ids) > most_tokens:
            raise RefusedError(
                f"{field}: {len(ids)} tokens are more than the model's context of {most_tokens}. "
                "Shorten it.",
                field,
            )
        return ids
