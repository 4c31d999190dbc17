"""Answers of every exit to closed-book questions: greedy decoding in batches, and how many are right."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig

from megatron_sorted.errors import SettingsError
from megatron_sorted.evaluation.answers import exact_match, exact_match_with_case, f1, first_line
from megatron_sorted.evaluation.nested_model import NestedModel
from megatron_sorted.evaluation.questions import Question
from megatron_sorted.text.prompt_form import PromptForm
from megatron_sorted.text.tokenizer.contract import Tokenizer
from megatron_sorted.text.tokenizer.fit import fitting_pad


@dataclass(frozen=True)
class Answered:
    """What one exit answered, by question, and its scores."""

    answers: list[str]
    scores: dict[str, list[float]]

    def mean(self, score: str) -> float:
        """Return the mean of ``exact_match``, ``exact_match_with_case`` or ``f1`` over questions."""
        return fmean(self.scores[score])

    def standard_error(self, score: str) -> float | None:
        """Return the standard error of the mean over questions; None for a single one."""
        values = self.scores[score]
        return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def encode_prompts(
    prompts: Sequence[str], tokenizer: Tokenizer, room: int
) -> tuple[list[list[int]], int]:
    """Return the prompts as tokens that begin with bos where the tokenizer's texts do, and how many were cut at the left to ``room``.

    Raises:
        SettingsError: There is no room for a prompt.
    """
    begin = [tokenizer.bos_id] if tokenizer.adds_bos else []
    cut, num_cut = _cut_at_the_left(tokenizer.encode_batch(list(prompts)), room, len(begin))
    return [begin + ids for ids in cut], num_cut


def encode_conversations(
    conversations: Sequence[Sequence[Mapping[str, str]]],
    form: PromptForm,
    tokenizer: Tokenizer,
    room: int,
) -> tuple[list[list[int]], int]:
    """Return conversations as the tokens a model is asked with, and how many were cut at the left to ``room``.

    Raises:
        SettingsError: There is no room for a prompt.
        DataError: The form does not take a conversation.
    """
    texts = [form.render(messages) for messages in conversations]
    return _cut_at_the_left(tokenizer.encode_batch(texts), room)


def _cut_at_the_left(
    encoded: list[list[int]], room: int, taken: int = 0
) -> tuple[list[list[int]], int]:
    """Return prompts cut to ``room``, of which a part is taken already, and how many were cut."""
    if room < 2:
        raise SettingsError(f"--max-new-tokens leaves {room} tokens for a prompt. Use fewer.")
    return [ids[taken - room :] for ids in encoded], sum(len(ids) > room - taken for ids in encoded)


@dataclass(frozen=True)
class Answering:
    """How answers are generated.

    Attributes:
        tokenizer: Of the model.
        max_new_tokens: At most so many tokens an answer.
        batch_size: Questions at a time.
        ends: Tokens that end an answer, beside eos and line breaks.
    """

    tokenizer: Tokenizer
    max_new_tokens: int
    batch_size: int = 16
    ends: tuple[int, ...] = ()

    @cached_property
    def stop_ids(self) -> list[int]:
        """Return the tokens after which an answer is over: eos, ``ends``, all with a line break."""
        decode, eos = self.tokenizer.decode, self.tokenizer.eos_id
        breaks = [token for token in range(self.tokenizer.vocab_size) if "\n" in decode([token])]
        return sorted({*breaks, *self.ends, *([] if eos is None else [eos])})


@torch.inference_mode()
def decode_greedily(
    sub_model: nn.Module, prompts: Sequence[list[int]], how: Answering, title: str | None = None
) -> list[str]:
    """Return what the model adds to each prompt, up to what ends an answer or ``max_new_tokens``.

    Prompts of similar length go together; shorter ones are filled at the left and masked there.
    """
    tokenizer, ends = how.tokenizer, how.stop_ids
    filling = fitting_pad(tokenizer, sub_model.get_input_embeddings().weight.shape[0])
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=how.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=filling,
    )
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    texts = [""] * len(prompts)
    with tqdm(total=len(prompts), desc=title, unit="question", disable=title is None) as bar:
        for begin in range(0, len(order), how.batch_size):
            places = order[begin : begin + how.batch_size]
            length = len(prompts[places[0]])
            empty = [length - len(prompts[place]) for place in places]
            ids_bs = torch.tensor(
                [[filling] * gap + prompts[place] for gap, place in zip(empty, places, strict=True)]
            )
            mask_bs = torch.tensor([[0] * gap + [1] * (length - gap) for gap in empty])
            output_bs = sub_model.generate(
                input_ids=ids_bs, attention_mask=mask_bs, generation_config=config
            )
            for place, ids in zip(places, output_bs[:, length:].tolist(), strict=True):
                texts[place] = tokenizer.decode(_until(ids, ends), skip_special_tokens=True)
            bar.update(len(places))
    return texts


def answer_questions(
    model: NestedModel,
    depth: int,
    questions: Sequence[Question],
    prompts: Sequence[list[int]],
    how: Answering,
    title: str | None = None,
) -> Answered:
    """Return the answers of one exit with their scores."""
    texts = decode_greedily(model.sub_model(depth), prompts, how, title)
    answers = [first_line(text) for text in texts]
    pairs = [(answer, question.right) for answer, question in zip(answers, questions, strict=True)]
    measures = {
        "exact_match": exact_match,
        "f1": f1,
        "exact_match_with_case": exact_match_with_case,
    }
    return Answered(
        answers,
        {name: [float(measure(*pair)) for pair in pairs] for name, measure in measures.items()},
    )


def _until(ids: list[int], ends: list[int]) -> list[int]:
    """Return the tokens up to the first that ends an answer, it included: text may stand before the break in the same token."""
    last = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: last + 1]
