"""The answers of every exit to closed-book questions, decoded greedily in batches, and scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig

from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.texts import Limits
from megatron_sorted.errors import SettingsError
from megatron_sorted.evaluation.answers import exact_match, exact_match_with_case, f1, first_line
from megatron_sorted.evaluation.decoded import continue_greedily
from megatron_sorted.evaluation.nested_model import NestedModel
from megatron_sorted.evaluation.questions import Question
from megatron_sorted.text.prompt_form import PromptForm
from megatron_sorted.text.tokenizer.contract import Tokenizer
from megatron_sorted.text.tokenizer.fit import fitting_pad


@dataclass(frozen=True)
class Answered:
    """The answers of one exit and their scores.

    Attributes:
        answers: Answer to each question.
        scores: Score of each answer, {name of the score: values}.
    """

    answers: list[str]
    scores: dict[str, list[float]]

    def mean(self, score: str) -> float:
        """Return the mean of a score over all questions."""
        return fmean(self.scores[score])

    def standard_error(self, score: str) -> float | None:
        """Return the standard error of the mean over questions; None for a single one."""
        values = self.scores[score]
        return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def encode_prompts(
    prompts: Sequence[str], tokenizer: Tokenizer, max_tokens: int
) -> tuple[list[list[int]], int]:
    """Return the tokens of prompts, with bos if the tokenizer adds it, truncated at the left.

    Returns:
        The prompts, and the number of truncated ones.

    Raises:
        SettingsError: ``max_tokens`` leaves nothing of a prompt.
    """
    begin = [tokenizer.bos_id] if tokenizer.adds_bos else []
    encoded = tokenizer.encode_batch(list(prompts))
    truncated, num_truncated = _truncate_left(encoded, max_tokens, len(begin))
    return [begin + ids for ids in truncated], num_truncated


def encode_conversations(
    conversations: Sequence[Sequence[Mapping[str, str]]],
    form: PromptForm,
    tokenizer: Tokenizer,
    max_tokens: int,
) -> tuple[list[list[int]], int]:
    """Return the tokens of conversations in a form, truncated at the left.

    Returns:
        The prompts, and the number of truncated ones.

    Raises:
        SettingsError: ``max_tokens`` leaves nothing of a prompt.
        DataError: The form does not accept a conversation.
    """
    texts = [form.render(messages) for messages in conversations]
    return _truncate_left(tokenizer.encode_batch(texts), max_tokens)


def _truncate_left(
    encoded: list[list[int]], max_tokens: int, num_added: int = 0
) -> tuple[list[list[int]], int]:
    """Truncate prompts so that with ``num_added`` tokens they have at most ``max_tokens``."""
    if max_tokens < 2:
        raise SettingsError(f"--max-new-tokens leaves {max_tokens} tokens for a prompt. Use fewer.")
    left = max_tokens - num_added
    return [ids[-left:] for ids in encoded], sum(len(ids) > left for ids in encoded)


@dataclass(frozen=True)
class Answering:
    """How answers are generated.

    Attributes:
        tokenizer: Tokenizer of the model.
        max_new_tokens: Maximum number of tokens of an answer.
        batch_size: Number of questions in a batch.
        ends: Tokens that end an answer, besides eos and line breaks.
    """

    tokenizer: Tokenizer
    max_new_tokens: int
    batch_size: int = 16
    ends: tuple[int, ...] = ()

    @cached_property
    def stop_ids(self) -> list[int]:
        """Return the tokens that end an answer: eos, ``ends``, and all with a line break."""
        decode, eos = self.tokenizer.decode, self.tokenizer.eos_id
        breaks = [token for token in range(self.tokenizer.vocab_size) if "\n" in decode([token])]
        return sorted({*breaks, *self.ends, *([] if eos is None else [eos])})


@torch.inference_mode()
def decode_greedily(
    sub_model: nn.Module, prompts: Sequence[list[int]], how: Answering, title: str | None = None
) -> list[str]:
    """Return the model's continuation of each prompt, up to the end of the answer.

    Prompts of similar length form a batch; shorter ones are padded at the left.

    Args:
        sub_model: The model.
        prompts: Tokens of each prompt.
        how: How answers are generated.
        title: Title of the progress bar; None for no bar.
    """
    tokenizer, ends = how.tokenizer, how.stop_ids
    pad = fitting_pad(tokenizer, sub_model.get_input_embeddings().weight.shape[0])
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=how.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad,
    )
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    texts = [""] * len(prompts)
    with tqdm(total=len(prompts), desc=title, unit="question", disable=title is None) as bar:
        for begin in range(0, len(order), how.batch_size):
            numbers = order[begin : begin + how.batch_size]
            rows = [prompts[number] for number in numbers]
            length = len(rows[0])
            gaps = [length - len(row) for row in rows]
            padded = [[pad] * gap + row for gap, row in zip(gaps, rows, strict=True)]
            mask_bs = torch.tensor([[0] * gap + [1] * (length - gap) for gap in gaps])
            output_bs = sub_model.generate(
                input_ids=torch.tensor(padded), attention_mask=mask_bs, generation_config=config
            )
            for number, ids in zip(numbers, output_bs[:, length:].tolist(), strict=True):
                texts[number] = tokenizer.decode(_until(ids, ends), skip_special_tokens=True)
            bar.update(len(rows))
    return texts


def answer_questions(
    model: NestedModel,
    depth: int,
    questions: Sequence[Question],
    prompts: Sequence[list[int]],
    how: Answering,
    title: str | None = None,
    network: Network | None = None,
) -> Answered:
    """Return the answers of one exit with their scores.

    Args:
        model: The model.
        depth: Depth of the exit.
        questions: The questions.
        prompts: Tokens of each prompt.
        how: How answers are generated.
        title: Title of the progress bar; None for no bar.
        network: The model as `decoded.decoding_network` returns it; None: transformers generates.
    """
    if network is None:
        texts = decode_greedily(model.sub_model(depth), prompts, how, title)
    else:
        limits = Limits(how.max_new_tokens, frozenset(how.stop_ids))
        added = continue_greedily(network, depth, prompts, limits, how.batch_size, title)
        texts = [how.tokenizer.decode(ids, skip_special_tokens=True) for ids in added]
    answers = [first_line(text) for text in texts]
    pairs = [(answer, question.right) for answer, question in zip(answers, questions, strict=True)]
    scores = {one.__name__: one for one in (exact_match, f1, exact_match_with_case)}
    return Answered(
        answers, {name: [float(score(*pair)) for pair in pairs] for name, score in scores.items()}
    )


def _until(ids: list[int], ends: list[int]) -> list[int]:
    """Return the tokens up to and including the first end.

    The end is included since a token may hold text before its line break.
    """
    last = next((index for index, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: last + 1]
