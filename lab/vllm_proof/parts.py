"""The parts of the proof: greedy texts and drafts, samples, bytes. Each keeps its rows at once."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lab.contests.rounds import Row, Store, digest, rounded
from lab.decoding.proof import fit
from lab.serving.rows import rows_of
from lab.vllm_proof.client import VllmProcess
from lab.vllm_proof.factors import ABORTED_AT, BASE, ENGINE, MEBIBYTE, Factor, factors, jobs
from lab.vllm_proof.ours import later_pairs_expected, margin, our_events, without_empty
from megatron_sorted.decoding.network import load_network
from megatron_sorted.errors import PlatformError
from megatron_sorted.exported.load import load_with_exits
from megatron_sorted.serving.vllm.options import EngineOptions, engine_arguments

SAMPLING, MEMORY = "sampling", "memory"
"""Names of the other parts in the rows."""
PLAIN, PLUG_IN, STOCK = "vLLM", "vLLM with the plug-in", "vLLM with a draft model"
TEMPERATURE, TOP_K, SAMPLED_PROMPT, SAMPLED_AT_ONCE = 1.0, 10, 8, 128
LEAST_P = 0.001
MENDED = ", which accepts steps without drafts"


@dataclass
class Proof:
    """The proof of one model.

    Attributes:
        model: Hugging Face directory with exits.
        store: The rows.
        process: vLLM's Python.
        prompts: All prompts, those of the base setting.
        few: Number of prompts of the other factors.
        num_tokens: Number of new tokens of a text.
    """

    model: Path
    store: Store
    process: VllmProcess
    prompts: Sequence[list[int]]
    few: int
    num_tokens: int

    def __post_init__(self) -> None:
        """Open the model in this process."""
        self.network = load_network(self.model, native="off")
        self.base_model, _ = load_with_exits(self.model, torch.float32)
        config = self.base_model.config
        self.depths = self.network.depths
        pair = 2 * config.num_key_value_heads * config.head_dim * 4  # float32
        self.factors = factors(self.depths, pair)

    def compare_texts(self, names: Sequence[str] | None, after: Callable[[], None]) -> None:
        """Compare the texts of every factor that has too few rows.

        Args:
            names: Names of the factors; None for all.
            after: Called after each.
        """
        for factor in self.factors:
            count = len(self.prompts) if factor.name == BASE else max(self.few, factor.least)
            kept = rows_of(self.store.rows, match=factor.name)
            if (names and factor.name not in names) or len(kept) >= count:
                continue
            print(factor.name, file=sys.stderr, flush=True)
            step = len(self.prompts) // count
            prompts = list(self.prompts[::step])[:count]
            self.store.rows = [row for row in self.store.rows if row["match"] != factor.name]
            try:
                self._keep(factor, jobs(factor, self.model, prompts, self.num_tokens))
                self.store.facts.get("failed", {}).pop(factor.name, None)
            except PlatformError as error:
                self.store.facts.setdefault("failed", {})[factor.name] = str(error)
                self.store.write()
                print(f"{factor.name}: {error}", file=sys.stderr, flush=True)
            after()

    def _keep(self, factor: Factor, both: dict[str, dict[str, Any]]) -> None:
        """Run the jobs of a factor and keep a row for each prompt."""
        answers = {name: self.process.ask(job) for name, job in both.items()}
        plain, other = answers["plain"], answers["other"]
        prompts, aborts = both["plain"]["prompts"], both["plain"].get("aborts")
        ours = None
        if factor.options is not None and factor.counts:
            ours = our_events(self.network, prompts, other["texts"], factor.options)
        rows = []
        for place, prompt in enumerate(prompts):
            text, theirs = plain["texts"][place], other["texts"][place]
            if aborts and aborts[place]:
                text, theirs = text[:ABORTED_AT], theirs[:ABORTED_AT]
            events = without_empty(other["events"][place])
            row = {
                "match": factor.name, "name": factor.name, "prompt": place, "tokens": len(text),
                "sha256": digest([text]), "place": None, "margin": None,
                "drafted": sum(one for one, _ in events),
                "accepted": sum(one for _, one in events), "verifications": len(events),
                "as_ours": None if ours is None else int(events == without_empty(ours[place])),
            }  # fmt: skip
            if "stop" in factor.sampling:  # a draft may end behind the string, its text does not
                same = plain["strings"][place] == other["strings"][place]
                theirs = text if same else theirs
            if theirs != text:
                row |= self._difference(prompt, text, theirs)
            rows.append(row)
        self.store.facts.setdefault("runs", {})[factor.name] = {
            name: {
                key: rounded(value) if isinstance(value, float) else value
                for key, value in answer.items()
                if isinstance(value, int | float)
            }
            | {
                "stopped": answer["ends"].count("stop"), "aborted": answer["ends"].count("abort"),
            }
            for name, answer in answers.items()
        }  # fmt: skip
        self.store.add(rows)

    def _difference(self, prompt: list[int], text: list[int], other: list[int]) -> dict[str, Any]:
        """Return where two texts differ, and how close transformers holds the two tokens."""
        pairs = zip(text, other, strict=False)
        shortest = min(len(text), len(other))
        place = next((at for at, (one, two) in enumerate(pairs) if one != two), shortest)
        if place == shortest:
            return {"place": place}
        before = [*prompt, *text[:place]]
        close = margin(self.base_model, before, text[place], other[place])
        return {"place": place, "margin": rounded(close)}

    def sample(self, num_samples: int) -> None:
        """Sample pairs of tokens with the plug-in, without it, and with vLLM's own draft model."""
        prompt = self.prompts[0][:SAMPLED_PROMPT]
        expected = later_pairs_expected(self.model, prompt, TEMPERATURE, TOP_K)
        second = self.depths[1]
        options = EngineOptions("self_speculative", (second,), num_draft_tokens=2)
        sorted_options = EngineOptions(
            "sorted_speculative", self.depths[:2], (0.5, 0.2), num_draft_tokens=2
        )
        stock = {
            "model": str(self.model),
            "speculative_config": {
                "method": "draft_model", "model": str(self.model), "num_speculative_tokens": 2,
            },
        }  # fmt: skip
        engines = {
            PLAIN: {"model": str(self.model)},
            PLUG_IN: engine_arguments(self.model, options),
            f"{PLUG_IN}, sorted": engine_arguments(self.model, sorted_options),
            STOCK: stock,
            f"{STOCK}{MENDED}": stock,
        }
        for name, engine in engines.items():
            if rows_of(self.store.rows, match=SAMPLING, name=name):
                continue
            print(f"{SAMPLING}: {name}", file=sys.stderr, flush=True)
            if name.startswith(STOCK):
                self.process.stop()  # the plug-in has repaired vLLM in this process
            job = {
                "mend_empty": name.endswith(MENDED),
                "engine": {**engine, **ENGINE, "max_num_seqs": SAMPLED_AT_ONCE},
                "prompts": [prompt] * num_samples,
                "sampling": {
                    "temperature": TEMPERATURE, "top_k": TOP_K, "max_tokens": 3,
                    "ignore_eos": True,
                },
            }  # fmt: skip
            try:
                answer = self.process.ask(job)
            except PlatformError as error:
                self.store.facts.setdefault("failed", {})[name] = str(error)
                self.store.write()
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                continue
            self.store.facts.get("failed", {}).pop(name, None)
            seen: dict[tuple[int, int], int] = {}
            for _, *pair in answer["texts"]:
                seen[tuple(pair)] = seen.get(tuple(pair), 0) + 1
            result = fit(seen, expected)
            events = [one for text in answer["events"] for one in text]
            impossible = sum(count for pair, count in seen.items() if pair not in expected)
            self.store.add(
                [
                    {
                        "match": SAMPLING, "name": name, "samples": result.num_samples,
                        "pairs": len(seen), "cells": result.cells, "impossible": impossible,
                        "chi_square": None if impossible else rounded(result.chi_square),
                        "p": rounded(result.p), "drafted": sum(one for one, _ in events),
                        "accepted": sum(one for _, one in events),
                    }
                ]
            )  # fmt: skip

    def count_bytes(self) -> None:
        """Count the bytes of weights, keys and values, with the plug-in and without."""
        second = self.depths[1]
        options = EngineOptions("self_speculative", (second,), num_draft_tokens=4)
        stock = {
            "method": "draft_model", "model": str(self.model), "num_speculative_tokens": 4,
        }  # fmt: skip
        engines = {
            PLAIN: {"model": str(self.model)},
            PLUG_IN: engine_arguments(self.model, options),
            f"{STOCK} (the whole model)": {"model": str(self.model), "speculative_config": stock},
        }
        for name, engine in engines.items():
            if rows_of(self.store.rows, match=MEMORY, name=name):
                continue
            print(f"{MEMORY}: {name}", file=sys.stderr, flush=True)
            job = {
                "engine": {**engine, **ENGINE, "kv_cache_memory_bytes": 64 * MEBIBYTE},
                "prompts": [self.prompts[0]], "memory": True,
                "sampling": {"temperature": 0, "max_tokens": 8, "ignore_eos": True},
            }  # fmt: skip
            row: Row = {"match": MEMORY, "name": name, **self.process.ask(job)["memory"]}
            self.store.add([row])

    def wrong(self) -> list[str]:
        """Return a line for everything that the proof was to show and did not."""
        lines = [
            f"{name}: {why}"
            for name, why in self.store.facts.get("failed", {}).items()
            if not name.startswith(STOCK)  # vLLM's own fault
        ]
        for factor in self.factors:
            rows = rows_of(self.store.rows, match=factor.name)
            if not rows or factor.options is None:
                continue
            differing = [row["prompt"] for row in rows if row["place"] is not None]
            if differing:
                lines.append(f"{factor.name}: prompts {differing[:8]}: the texts differ")
            counted = [row["prompt"] for row in rows if row["as_ours"] == 0]
            if counted:
                lines.append(f"{factor.name}: prompts {counted[:8]}: drafts differ from ours")
            if not sum(row["accepted"] for row in rows):
                lines.append(f"{factor.name}: no draft was accepted")
            run = self.store.facts["runs"][factor.name]["other"]
            if factor.evidence and not run[factor.evidence]:
                lines.append(f"{factor.name}: it never happened ({factor.evidence} is 0)")
        lines += [
            f"{row['name']}: samples do not fit, p {row['p']:.2g}"
            for row in rows_of(self.store.rows, match=SAMPLING)
            if row["p"] < LEAST_P and not row["name"].startswith(STOCK)
        ]
        return lines
