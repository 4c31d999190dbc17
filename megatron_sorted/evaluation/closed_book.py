"""Answers of every exit to closed-book questions: greedy decoding in batches, and how many are right."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig

from megatron_sorted.errors import SettingsError
from megatron_sorted.evaluation.answers import exact_match, exact_match_with_case, f1, first_line
from megatron_sorted.evaluation.nested_model import NestedModel
from megatron_sorted.evaluation.questions import Question
from megatron_sorted.exported.tokenizer import encode_texts
from megatron_sorted.text.prompt_form import PromptForm
from megatron_sorted.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answered:
    """What one exit answered, by question, and its scores."""

    answers: list[str]
    scores: dict[str, list[float]]

    def mean(self, score: str) -> float:
        """Returns the mean of ``exact_match``, ``exact_match_with_case`` or ``f1`` over questions."""
        return fmean(self.scores[score])

    def standard_error(self, score: str) -> float | None:
        """Returns the standard error of the mean over questions; None for a single one."""
        values = self.scores[score]
        return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def encode_prompts(prompts: Sequence[str], tokenizer: Tokenizer, room: int) -> tuple[list[list[int]], int]:
    """Returns the prompts as tokens that begin with bos where the tokenizer's texts do, and how many were cut at the left to ``room``.

    Raises:
        SettingsError: There is no room for a prompt.
    """
    if room < 2:
        raise SettingsError(f"--max-new-tokens leaves {room} tokens for a prompt. Use fewer.")
    begin = [tokenizer.bos_id] if tokenizer.adds_bos else []
    encoded = encode_texts(tokenizer, list(prompts))
    keep = room - len(begin)
    return [begin + ids[-keep:] for ids in encoded], sum(len(ids) > keep for ids in encoded)


def encode_conversations(conversations: Sequence[Sequence[Mapping[str, str]]], form: PromptForm, tokenizer: Tokenizer,
                         room: int) -> tuple[list[list[int]], int]:
    """Return conversations as the tokens a model is asked with, and how many were cut at the left to ``room``.

    Raises:
        SettingsError: There is no room for a prompt.
        DataError: The form does not take a conversation.
    """
    if room < 2:
        raise SettingsError(f"--max-new-tokens leaves {room} tokens for a prompt. Use fewer.")
    encoded = tokenizer.encode_batch([form.render(messages) for messages in conversations])
    return [ids[-room:] for ids in encoded], sum(len(ids) > room for ids in encoded)


def stop_ids(tokenizer: Tokenizer, ends: Sequence[int] = ()) -> list[int]:
    """Return the tokens after which an answer is over: eos, ``ends``, and every token with a line break in it."""
    breaks = [token for token in range(tokenizer.vocab_size) if "\n" in tokenizer.decode([token])]
    return sorted({*breaks, *ends, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])})


@torch.inference_mode()
def decode_greedily(sub_model: nn.Module, prompts: Sequence[list[int]], tokenizer: Tokenizer, max_new_tokens: int,
                    batch_size: int = 16, title: str | None = None, ends: Sequence[int] = ()) -> list[str]:
    """Returns what the model adds to each prompt, up to eos, a line break or ``max_new_tokens``.

    Prompts of similar length go together; shorter ones are filled at the left and masked there.
    """
    ends = stop_ids(tokenizer, ends)
    filling = tokenizer.pad_id
    config = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=filling)
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    texts = [""] * len(prompts)
    with tqdm(total=len(prompts), desc=title, unit="question", disable=title is None) as bar:
        for begin in range(0, len(order), batch_size):
            places = order[begin:begin + batch_size]
            length = len(prompts[places[0]])
            empty = [length - len(prompts[place]) for place in places]
            ids_bs = torch.tensor([[filling] * gap + prompts[place] for gap, place in zip(empty, places, strict=True)])
            mask_bs = torch.tensor([[0] * gap + [1] * (length - gap) for gap in empty])
            output_bs = sub_model.generate(input_ids=ids_bs, attention_mask=mask_bs, generation_config=config)
            for place, ids in zip(places, output_bs[:, length:].tolist(), strict=True):
                texts[place] = tokenizer.decode(_until(ids, ends), skip_special_tokens=True)
            bar.update(len(places))
    return texts


def answer_questions(model: NestedModel, depth: int, questions: Sequence[Question], prompts: Sequence[list[int]],
                     tokenizer: Tokenizer, max_new_tokens: int = 32, batch_size: int = 16,
                     title: str | None = None, ends: Sequence[int] = ()) -> Answered:
    """Returns the answers of one exit with their scores."""
    texts = decode_greedily(model.sub_model(depth), prompts, tokenizer, max_new_tokens, batch_size, title, ends)
    answers = [first_line(text) for text in texts]
    scores = {"exact_match": [float(exact_match(a, q.right)) for a, q in zip(answers, questions, strict=True)],
              "f1": [f1(a, q.right) for a, q in zip(answers, questions, strict=True)],
              "exact_match_with_case": [float(exact_match_with_case(a, q.right)) for a, q in zip(answers, questions, strict=True)]}
    return Answered(answers, scores)


def _until(ids: list[int], ends: list[int]) -> list[int]:
    """Returns the tokens up to the first that ends an answer, it included: text may stand before the break in the same token."""
    last = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[:last + 1]
