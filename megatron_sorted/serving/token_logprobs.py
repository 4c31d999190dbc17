"""Log-probabilities of a text's tokens as the full model gives them, and OpenAI's two forms of telling them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sorted.decoding.cache.capacity import as_memory_error
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.text_generator import ANCHOR, BROKEN
from megatron_sorted.text.tokenizer.contract import Tokenizer

BYTE = re.compile("<0x[0-9A-F]{2}>")
"""How sentencepiece names a byte."""
POSITIONS_AT_ONCE = 64
"""Whose logits over the vocabulary exist at one time."""


@dataclass(frozen=True)
class TokenScore:
    """A token of a text and how likely it was.

    Attributes:
        text: The token's text.
        logprob: Natural logarithm of its probability after what stands before it; None for a text's first token.
        top: (text, logprob) of the most likely tokens there, the likeliest first.
        is_prompt: Whether it is of the prompt.
    """

    text: str
    logprob: float | None
    top: list[tuple[str, float]]
    is_prompt: bool


@torch.inference_mode()
def logprobs_of(
    network: Network, tokens: Sequence[int], first: int, num_top: int
) -> list[tuple[float, list[tuple[int, float]]]]:
    """Return (logprob, [(token, logprob)] of the most likely) of the tokens from place ``first`` on, which is 1 or more.

    One pass of the full model over the whole text, as transformers computes it; neither temperature nor penalties change them.

    Raises:
        MemoryExhaustedError: The text does not fit into memory.
    """
    found = []
    with as_memory_error():
        ids_1s = torch.tensor([list(tokens)], device=network.device)
        hidden_sh = network.model.model(
            input_ids=ids_1s[:, :-1], use_cache=False
        ).last_hidden_state[0]
        for begin in range(first, len(tokens), POSITIONS_AT_ONCE):
            places = range(begin, min(begin + POSITIONS_AT_ONCE, len(tokens)))
            logits_nv: Tensor = network.model.lm_head(hidden_sh[places.start - 1 : places.stop - 1])
            scores_nv = logits_nv.float().log_softmax(-1)
            own_n = scores_nv.gather(-1, ids_1s[0, places.start : places.stop, None])[:, 0].tolist()
            best = scores_nv.topk(min(num_top, scores_nv.size(-1)), dim=-1)
            found += [
                (own, list(zip(ids, values, strict=True)))
                for own, ids, values in zip(
                    own_n, best.indices.tolist(), best.values.tolist(), strict=True
                )
            ]
    return found


class TokenTexts:
    """Texts of single tokens, no two the same: a client's dictionary of likely tokens is keyed by them.

    Half characters, and a token whose text another has already, go by their names in the vocabulary.

    Args:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.known, self.owners = tokenizer, {}, {}
        self.anchor = tokenizer.encode_batch([ANCHOR])[
            0
        ]  # behind it no space before a word is left out
        self.before = len(tokenizer.decode(self.anchor))

    def __getitem__(self, token: int) -> str:
        """Return a token's text or name."""
        if token not in self.known:
            text = self.tokenizer.decode([*self.anchor, token])[self.before :]
            name = (
                self.tokenizer.token_text(token) or f"token {token}"
            )  # a row of the model that no token has
            is_whole = text and BROKEN not in text and not BYTE.fullmatch(name)
            self.known[token] = (
                text if is_whole and self.owners.setdefault(text, token) == token else name
            )
        return self.known[token]


def score_text(
    network: Network,
    texts: TokenTexts,
    prompt: Sequence[int],
    added: Sequence[int],
    num_top: int,
    with_prompt: bool,
) -> list[TokenScore]:
    """Return the scores of the tokens that were added to a prompt; ``with_prompt`` those of the prompt before them.

    Raises:
        MemoryExhaustedError: The text does not fit into memory.
    """
    whole, begin = [*prompt, *added], 0 if with_prompt else len(prompt)
    found = (
        logprobs_of(network, whole, max(begin, 1), num_top) if len(whole) > max(begin, 1) else []
    )
    scores = [TokenScore(texts[whole[0]], None, [], True)] if begin == 0 else []
    for place, (logprob, top) in enumerate(found, max(begin, 1)):
        best = [(texts[token], value) for token, value in top]
        scores.append(TokenScore(texts[whole[place]], logprob, best, place < len(prompt)))
    return scores


def as_text_logprobs(scores: Sequence[TokenScore], first_offset: int) -> dict:
    """Return scores as /v1/completions tells them; a token that is not among the most likely is told beside them, as OpenAI does."""
    offsets, place = [], first_offset
    for score in scores:
        offsets.append(place)
        place += len(score.text)
    tops = [
        None
        if score.logprob is None
        else dict([*score.top, (score.text, score.logprob)])
        if score.top
        else {}
        for score in scores
    ]
    return {
        "tokens": [score.text for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def as_chat_logprobs(scores: Sequence[TokenScore]) -> dict:
    """Return scores as /v1/chat/completions tells them."""

    def entry(text: str, logprob: float | None) -> dict:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {
        "content": [
            {**entry(score.text, score.logprob), "top_logprobs": [entry(*one) for one in score.top]}
            for score in scores
        ],
        "refusal": None,
    }
