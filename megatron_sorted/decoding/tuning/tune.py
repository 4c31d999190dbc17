"""Tuning of a model's decoding strategies for a machine.

The exits' choices in generated texts are recorded and the times of forward passes are measured.
From both the speed of many options is forecast, and the best options of each strategy are run.
"""

import dataclasses
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_sorted.decoding.generate import Limits, generate
from megatron_sorted.decoding.network import config_sha256, draft_key
from megatron_sorted.decoding.requested_strategy import check_draft
from megatron_sorted.decoding.strategies import SPECULATIVE, Full, Strategy
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.decoding.tuning.costs import measure_costs
from megatron_sorted.decoding.tuning.search import Tuner
from megatron_sorted.decoding.tuning.traces import record
from megatron_sorted.decoding.tuning.tuned_options import write_tuned_options
from megatron_sorted.errors import SettingsError


def depths_to_try(generator: TextGenerator) -> list[int]:
    """Return the exits that may draft: those before the last layer, or all of another model.

    Raises:
        SettingsError: There are none, or the other model cannot draft for this one.
    """
    if generator.draft is not None:
        check_draft(generator.draft, generator.network)
        return list(generator.draft.depths)
    depths = list(generator.network.depths[:-1])
    if not depths:
        raise SettingsError(
            "the model has no exits before its last layer, so there is nothing to choose. "
            "Give --depths or --draft, or train exits."
        )
    return depths


class Tuning:
    """The tuning of a model's decoding strategies.

    Args:
        generator: The model.
        draft: Directory of another model that drafts; None without one.
        depths: Exits that may draft.
        prompts: Tokens of prompts like those that will be used.
        limits: Where texts end.
    """

    def __init__(
        self,
        generator: TextGenerator,
        draft: Path | None,
        depths: Sequence[int],
        prompts: Sequence[list[int]],
        limits: Limits,
    ):
        """Record traces and measure costs."""
        self.generator, self.draft, self.limits = generator, draft, limits
        self.depths, self.prompts = list(depths), list(prompts)
        self.choices: dict[str, Strategy] = {}
        self.speeds: dict[str, tuple[float, float]] = {}
        network, other = generator.network, generator.draft
        exits = f"exits {', '.join(map(str, depths))}"
        print(
            f"{len(prompts)} prompts, {exits} of {draft.resolve().name}, which drafts for a model "
            f"with {network.num_layers} layers"
            if other
            else f"{len(prompts)} prompts, {exits} of {network.num_layers} layers",
            flush=True,
        )
        traces = [
            trace
            for prompt in tqdm(prompts, "recording the exits' choices", unit="text")
            for trace in record(network, [prompt], depths, limits=limits, drafter=other)
        ]
        print("measuring forward passes ...", flush=True)
        own = [network.num_layers] if other else [*depths, network.num_layers]
        costs = measure_costs(network, own)
        drafting = measure_costs(other, depths) if other else None
        self.tuner = Tuner(traces, depths, costs, network.num_layers, drafting)

    def speed(self, name: str) -> float:
        """Return the measured tokens per second of a strategy."""
        return self.speeds[name][0]

    def choose(self, least_same: float) -> None:
        """Choose the options of each strategy with the best forecast, run them, print the results.

        Args:
            least_same: Share of tokens that early_exit must have in common with the full model.
        """
        print("searching for the fastest options ...", flush=True)
        tuner = self.tuner
        self.choices = {
            "full": Full(),
            "self_speculative": tuner.self_speculative().strategy,
            "sorted_speculative": tuner.sorted_speculative().strategy,
        }
        early = None if self.generator.draft else tuner.early_exit(least_same)
        if early is not None:
            self.choices["early_exit"] = early.strategy
        self.speeds = {
            name: self._run(strategy, self.prompts)
            for name, strategy in tqdm(self.choices.items(), "running", unit="strategy")
        }
        trees = {
            tree: self._run(tree, self.prompts[:4])
            for tree in tqdm(tuner.trees(), "running draft trees", unit="tree")
        }
        self.choices["tree"] = max(trees, key=lambda tree: trees[tree][0])
        self.speeds["tree"] = self._run(self.choices["tree"], self.prompts)
        print(f"\n{'strategy':20} {'tokens/s':>9} {'speed-up':>9} {'tokens/step':>12}  options")
        for name, strategy in self.choices.items():
            options = ", ".join(
                f"{key} {value}" for key, value in dataclasses.asdict(strategy).items()
            )
            speed, tokens_per_step = self.speeds[name]
            print(
                f"{name:20} {speed:9.1f} {speed / self.speed('full'):8.2f}x "
                f"{tokens_per_step:12.2f}  {options}"
            )

    def keep(self, path: Path, machine: Mapping[str, str]) -> str:
        """Write the chosen options; return the fastest strategy that changes no text."""
        tuner, draft = self.tuner, self.generator.draft
        stored = {
            name: strategy
            for name, strategy in self.choices.items()
            if draft is None or isinstance(strategy, SPECULATIVE)
        }
        best = max((name for name in stored if name != "early_exit"), key=self.speed)
        num_tokens = sum(len(trace.tokens) for trace in tuner.traces)
        tuned = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": {
                **machine,
                "threads": torch.get_num_threads(),
                "processor": platform.processor(),
            },
            "dtype": self.generator.network.kind,
            "native": self.generator.network.is_native,
            "best": best,
            "strategies": {name: dataclasses.asdict(strategy) for name, strategy in stored.items()},
            "tokens_per_second": {
                name: round(speed, 2) for name, (speed, _) in self.speeds.items()
            },
            "agreement": {
                str(depth): round(
                    sum(sum(trace.same_dn[index]) for trace in tuner.traces) / num_tokens, 4
                )
                for index, depth in enumerate(self.depths)
            },
            "costs": dataclasses.asdict(tuner.costs),
        }
        if draft is None:
            write_tuned_options(path, tuned)
        else:
            tuned = {
                "name": self.draft.resolve().name,
                "config_sha256": config_sha256(draft),
                **tuned,
                "draft_costs": dataclasses.asdict(tuner.drafting),
            }
            write_tuned_options(path, tuned, draft_key(self.draft, draft))
        return best

    def _run(self, strategy: Strategy, prompts: Sequence[list[int]]) -> tuple[float, float]:
        """Return tokens per second and tokens per step of a strategy."""
        network, draft = self.generator.network, self.generator.draft_for(strategy)
        short = dataclasses.replace(self.limits, max_new_tokens=8)
        generate(network, prompts[:1], strategy, limits=short, draft=draft)  # warm up
        began, tokens, steps = time.perf_counter(), 0, 0
        for prompt in prompts:
            [text] = generate(network, [prompt], strategy, limits=self.limits, draft=draft)
            tokens, steps = tokens + len(text.tokens), steps + text.counts.num_steps
        return tokens / (time.perf_counter() - began), tokens / steps
