"""Log-probabilities of a text's tokens under the full model, and OpenAI's two formats for them."""

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sorted.decoding.cache.joined import Pass
from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.text_generator import ANCHOR, BROKEN
from megatron_sorted.text.tokenizer.contract import Tokenizer

BYTE = re.compile("<0x[0-9A-F]{2}>")
"""The name of a byte token in sentencepiece vocabularies."""
POSITIONS_AT_ONCE = 64
"""Number of positions whose logits over the vocabulary exist at one time."""


@dataclass(frozen=True)
class TokenScore:
    """A token of a text and its log-probability.

    Attributes:
        text: The token's text.
        logprob: Natural logarithm of its probability given all tokens before it; None for a
            text's first token.
        top: (text, logprob) of the most likely tokens at this position, the likeliest first.
        is_prompt: Whether the token belongs to the prompt.
    """

    text: str
    logprob: float | None
    top: list[tuple[str, float]]
    is_prompt: bool


@dataclass
class Scoring:
    """The log-probabilities that a request wants for every token of its texts.

    Attributes:
        num_top: Number of most likely tokens listed beside each token.
        with_prompt: Whether tokens of prompts are scored too.
    """

    num_top: int
    with_prompt: bool


Logprobs = list[tuple[float, list[tuple[int, float]]]]
"""(logprob, [(token, logprob)] of the most likely) of tokens that follow each other."""


def logprobs_of(
    state: DecodingState, tokens: Sequence[int], first: int, num_top: int
) -> Generator[Pass, Tensor, Logprobs]:
    """Yield the passes that log-probabilities need; return those of tokens from ``first`` on.

    One run of the full model over the whole text, with the products that write texts; temperature
    and penalties do not change the numbers.

    Args:
        state: An empty state of the model.
        tokens: The text.
        first: Position of the first scored token, 1 or more.
        num_top: Number of most likely tokens to list.
    """
    scored: Logprobs = []
    ids_1s = torch.tensor([list(tokens)], device=state.device)
    state.append(ids_1s[:, :-1])
    for begin in range(first, len(tokens), POSITIONS_AT_ONCE):
        end = min(begin + POSITIONS_AT_ONCE, len(tokens))
        slots_1n = torch.arange(begin - 1, end - 1, device=state.device)[None]
        logits_1nv = yield Pass(state, max(state.segments), slots_1n)
        scores_nv = logits_1nv[0].float().log_softmax(-1)
        own_n = scores_nv.gather(-1, ids_1s[0, begin:end, None])[:, 0].tolist()
        best = scores_nv.topk(min(num_top, scores_nv.size(-1)), dim=-1)
        scored += [
            (own, list(zip(ids, values, strict=True)))
            for own, ids, values in zip(
                own_n, best.indices.tolist(), best.values.tolist(), strict=True
            )
        ]
    return scored


class TokenTexts:
    """Texts of single tokens, all different: clients key a dictionary of likely tokens by them.

    Incomplete characters, and tokens whose text another token already has, are represented by
    their names in the vocabulary.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.known, self.owners = tokenizer, {}, {}
        # after an anchor the tokenizer keeps the space before a word
        self.anchor = tokenizer.encode_batch([ANCHOR])[0]
        self.before = len(tokenizer.decode(self.anchor))

    def __getitem__(self, token: int) -> str:
        """Return a token's text or name."""
        if token not in self.known:
            text = self.tokenizer.decode([*self.anchor, token])[self.before :]
            # a model may have rows that no token of the vocabulary uses
            name = self.tokenizer.token_text(token) or f"token {token}"
            is_whole = text and BROKEN not in text and not BYTE.fullmatch(name)
            self.known[token] = (
                text if is_whole and self.owners.setdefault(text, token) == token else name
            )
        return self.known[token]


def score_text(
    state: DecodingState,
    texts: TokenTexts,
    prompt: Sequence[int],
    added: Sequence[int],
    scoring: Scoring,
) -> Generator[Pass, Tensor, list[TokenScore]]:
    """Yield passes; return the scores of the tokens added to a prompt, or of both."""
    whole, begin = [*prompt, *added], 0 if scoring.with_prompt else len(prompt)
    first = max(begin, 1)
    scores = [TokenScore(texts[whole[0]], None, [], True)] if begin == 0 else []
    scored: Logprobs = []
    if len(whole) > first:
        scored = yield from logprobs_of(state, whole, first, scoring.num_top)
    for position, (logprob, top) in enumerate(scored, first):
        best = [(texts[token], value) for token, value in top]
        scores.append(TokenScore(texts[whole[position]], logprob, best, position < len(prompt)))
    return scores


def as_text_logprobs(scores: Sequence[TokenScore], first_offset: int) -> dict:
    """Return scores in the format of /v1/completions.

    As in OpenAI's, a token that is not among the most likely is listed beside them.
    """
    offsets, offset = [], first_offset
    for score in scores:
        offsets.append(offset)
        offset += len(score.text)
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
    """Return scores in the format of /v1/chat/completions."""

    def entry(text: str, logprob: float | None) -> dict:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {
        "content": [
            {**entry(score.text, score.logprob), "top_logprobs": [entry(*one) for one in score.top]}
            for score in scores
        ],
        "refusal": None,
    }
