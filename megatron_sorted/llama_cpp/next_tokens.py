"""The tokens that llama.cpp writes, judged by transformers' logits at every position.

Both see the same text, so a difference does not grow: position by position, the token that was
written is compared with the most likely one. Two correct programs in float32 can differ only where
two logits are as near as rounding; every such place is listed with its margin.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megatron_sorted.conversion.open_model import OpenModel
from megatron_sorted.conversion.verifying.comparison import TEXT, TOLERANCE, text_tokens
from megatron_sorted.conversion.verifying.transformers_states import transformers_exits
from megatron_sorted.llama_cpp.server import LlamaServer
from megatron_sorted.llama_cpp.source_directory import BLANK
from megatron_sorted.text.prompt_form import PromptForm

PROMPT_LENGTHS = (8, 24, 56)
NEW_TOKENS = 24
CONVERSATION = (
    {"role": "user", "content": "How many books are there?"},
    {"role": "assistant", "content": "About 12,000."},
    {"role": "user", "content": "Name one."},
)


@dataclass(frozen=True)
class Difference:
    """A token that transformers would not have written.

    Attributes:
        position: Place in the text.
        written, best: The token, and the most likely one.
        margin: How far its logit is below that of the most likely one.
        largest: The largest absolute logit there.
    """

    position: int
    written: int
    best: int
    margin: float
    largest: float

    def is_near_tie(self, tolerance: float = TOLERANCE) -> bool:
        """Return whether the margin is one that errors of two logits can make."""
        return self.margin <= 2 * tolerance * max(1.0, self.largest)


@dataclass
class Agreement:
    """How many tokens of one file are those of transformers.

    Attributes:
        depth: Number of layers.
        kind: Type of the file's weights.
        num_tokens, num_same: Number of tokens, and of equal ones.
        differences: The others.
    """

    depth: int
    kind: str
    num_tokens: int = 0
    num_same: int = 0
    differences: list[Difference] = field(default_factory=list)

    def problems(self, tolerance: float = TOLERANCE) -> list[str]:
        """Return a sentence for each difference that is no near tie."""
        return [
            f"exit @{self.depth}: llama.cpp writes token {one.written} at position {one.position}, "
            f"where {one.best} is more likely by a logit difference of {one.margin:.3g} (largest "
            f"logit {one.largest:.3g})"
            for one in self.differences
            if not one.is_near_tie(tolerance)
        ]

    def line(self) -> str:
        """Return the row of the table that a user reads."""
        ties = [one for one in self.differences if one.is_near_tie()]
        shown = f"{self.num_same} of {self.num_tokens}"
        if ties:
            shown += f", {len(ties)} near ties (margins {_margins(ties)})"
        if others := [one for one in self.differences if not one.is_near_tie()]:
            shown += f", {len(others)} others (margins {_margins(others)})"
        return f"{'@' + str(self.depth):>5}  {self.kind:>8}  {shown}"


def _margins(differences: Sequence[Difference]) -> str:
    shown = ", ".join(f"{one.margin:.2g}" for one in differences[:4])
    return shown + (", ..." if len(differences) > 4 else "")


def beginnings(model: OpenModel) -> list[list[int]]:
    """Return the prompts that every file continues: beginnings of the text of verifications."""
    tokens = text_tokens(model)[0].tolist()
    return [tokens[:length] for length in PROMPT_LENGTHS if length < len(tokens)] or [
        tokens[: max(1, len(tokens) // 2)]
    ]


def compare_next_tokens(
    server: LlamaServer,
    model: OpenModel,
    depth: int,
    kind: str,
    prompts: Sequence[list[int]],
    most_tokens: int = NEW_TOKENS,
) -> Agreement:
    """Let a server continue prompts, and judge every token.

    Args:
        server: The server of the file.
        model: The nested model, as a Hugging Face directory.
        depth: The exit of the file.
        kind: Type of the file's weights.
        prompts: Prompts in tokens.
        most_tokens: Number of new tokens of each.
    """
    agreement = Agreement(depth, kind)
    longest = model.settings.max_position_embeddings or 1 << 62
    for prompt in prompts:
        text, end = list(prompt), min(len(prompt) + most_tokens, longest)
        while len(text) < end:  # behind an end token the text is continued anew
            tokens = server.complete(text, end - len(text), ignore_eos=False).tokens
            if not tokens:
                break
            text += tokens
        written = text[len(prompt) :]
        judge(agreement, logits_of(model, text[:-1], depth), prompt, written)
    return agreement


def logits_of(model: OpenModel, tokens: Sequence[int], depth: int) -> torch.Tensor:
    """Return transformers' logits [s, v] of an exit for a text, in float32."""
    return transformers_exits(model, torch.tensor([list(tokens)]), (depth,))[depth].logits()[0]


def judge(
    agreement: Agreement, logits_sv: torch.Tensor, prompt: Sequence[int], written: Sequence[int]
) -> None:
    """Add the tokens of one text to an agreement.

    Args:
        agreement: What is known so far.
        logits_sv: Logits [s, v] at every position of the prompt and the text but the last.
        prompt: The tokens before the text.
        written: The tokens of the text.
    """
    for place, token in enumerate(written, len(prompt)):
        logits_v = logits_sv[place - 1]
        best = int(logits_v.argmax())
        agreement.num_tokens += 1
        if token == best:
            agreement.num_same += 1
            continue
        margin = float(logits_v[best] - logits_v[token])
        largest = float(logits_v.abs().max())
        agreement.differences.append(Difference(place, token, best, margin, largest))


def vocabulary_problems(
    server: LlamaServer, model: OpenModel, form: PromptForm | None, puts_blank: bool
) -> list[str]:
    """Return a sentence for each text, or conversation, that llama.cpp reads as other tokens.

    Args:
        server: A running server.
        model: The model.
        form: The prompt template that came with it.
        puts_blank: Whether the server puts a blank before texts; otherwise they are sent with one,
            where the tokenizer puts it.
    """
    tokenizer, problems = model.open_tokenizer(), []
    for text in [part for part in TEXT.split("\n") if part]:
        starts = tokenizer.token_text(tokenizer.encode(text)[0]).startswith(BLANK)
        sent = f" {text}" if starts and not puts_blank else text
        problems += _other_tokens(
            f"the text {text[:40]!r}", server.tokens_of(sent), tokenizer.encode_prompt(text)
        )
    if form is not None and form.is_conversation:
        rendered = server.rendered(CONVERSATION)
        others = _other_tokens(
            "a conversation",
            server.tokens_of(rendered),  # bos too, where the vocabulary asks for it
            tokenizer.encode_rendered(form.render(CONVERSATION)),
        )
        problems += [f"{one}; it is rendered as {rendered[:160]!r}" for one in others]
    return problems


def _other_tokens(what: str, theirs: Sequence[int], ours: Sequence[int]) -> list[str]:
    if list(theirs) == list(ours):
        return []
    first = next(
        (n for n, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]),
        min(len(theirs), len(ours)),
    )
    return [
        f"{what} becomes {len(theirs)} tokens instead of {len(ours)}, other ones from the "
        f"{first + 1}th on: {list(theirs[first : first + 4])} instead of "
        f"{list(ours[first : first + 4])}"
    ]
