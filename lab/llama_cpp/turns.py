"""llama-servers that continue the same prompts in turns, and transformers' judgement of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.contests.rounds import digest, num_same, rounded
from megatron_sorted.conversion.open_model import OpenModel
from megatron_sorted.llama_cpp.draft_settings import DraftSettings
from megatron_sorted.llama_cpp.next_tokens import Agreement, judge, logits_of
from megatron_sorted.llama_cpp.server import Completion, LlamaServer, ServedModel
from megatron_sorted.llama_cpp.writing import file_name

PLAIN, DRAFT = "plain", "draft"
Row = dict[str, Any]


@dataclass(frozen=True)
class Files:
    """The files of a model, as ``megatron-sorted convert gguf`` wrote them.

    Attributes:
        folder: Their folder.
        name: The model's name in theirs.
        num_layers: Number of its layers.
    """

    folder: Path
    name: str
    num_layers: int

    def path(self, depth: int, kind: str) -> Path:
        """Return the file of an exit."""
        return self.folder / file_name(self.name, depth, self.num_layers, kind)


def served_models(
    program: Path, files: Files, kinds: Sequence[str], draft: DraftSettings, threads: int,
    context: int,
) -> dict[tuple[str, str], ServedModel]:  # fmt: skip
    """Return what each server runs, by type of weights and strategy.

    All have llama.cpp's defaults for keys, values and flash attention.
    """
    served = {}
    for kind in kinds:
        full = files.path(files.num_layers, kind)
        served[kind, PLAIN] = ServedModel(program, full, threads, context)
        served[kind, DRAFT] = ServedModel(
            program, full, threads, context, draft=files.path(draft.depth, kind),
            num_draft_tokens=draft.num_draft_tokens, least_confidence=draft.least_confidence,
        )  # fmt: skip
    return served


def take_turns(
    servers: Mapping[tuple[str, str], LlamaServer],
    prompts: Sequence[list[int]],
    num_tokens: int,
    rounds: int,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[tuple[list[Row], dict[tuple[str, str], list[list[int]]]]]:
    """Yield the rows of each round, and the texts that were written in it.

    Args:
        servers: Running servers by type of weights and strategy.
        prompts: Prompts in tokens, continued one after another.
        num_tokens: Number of new tokens of each.
        rounds: Number of rounds; in each another server begins.
        tick: Called after each turn.
    """
    keys = list(servers)
    for key in keys:
        servers[key].complete(prompts[0], 4)
    for number in range(rounds):
        rows, texts = [], {}
        for place in range(len(keys)):
            key = keys[(number + place) % len(keys)]
            done = [servers[key].complete(prompt, num_tokens) for prompt in prompts]
            texts[key] = [one.tokens for one in done]
            rows.append(row_of(key, number, done))
            tick()
        for row in rows:
            plain = texts[row["kind"], PLAIN]
            row["same"] = num_same(texts[row["kind"], row["strategy"]], plain)
        yield rows, texts


def row_of(key: tuple[str, str], number: int, done: Sequence[Completion]) -> Row:
    """Return the row of a turn; times are the server's own, of new tokens and of prompts."""
    return {
        "kind": key[0], "strategy": key[1], "round": number, "texts": len(done),
        "tokens": sum(len(one.tokens) for one in done),
        "prompt_tokens": sum(one.num_prompt_tokens for one in done),
        "seconds": rounded(sum(one.seconds for one in done)),
        "prompt_seconds": rounded(sum(one.prompt_seconds for one in done)),
        "drafted": sum(one.num_drafted for one in done),
        "accepted": sum(one.num_accepted for one in done),
        "sha256": digest([one.tokens for one in done]),
    }  # fmt: skip


def agreement_of(
    model: OpenModel, depth: int, kind: str, prompts: Sequence[list[int]],
    texts: Sequence[list[int]], ends: Sequence[int],
) -> Agreement:  # fmt: skip
    """Judge every token of texts by transformers in float32; end tokens were not allowed."""
    agreement = Agreement(depth, kind)
    for prompt, text in zip(prompts, texts, strict=True):
        logits_sv = logits_of(model, [*prompt, *text[:-1]], depth)
        logits_sv[:, list(ends)] = float("-inf")
        judge(agreement, logits_sv, prompt, text)
    return agreement
