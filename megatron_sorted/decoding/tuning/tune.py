"""How a model is tuned for a machine.

What its exits say of texts is recorded, what reading costs is measured; from both every setting's speed is forecast, and the best of each
way are run.
"""

import dataclasses
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_sorted.decoding.choice import check_draft
from megatron_sorted.decoding.generate import Limits, generate
from megatron_sorted.decoding.network import config_sha256, draft_key
from megatron_sorted.decoding.strategies import SPECULATIVE, Full, Strategy
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.decoding.tuning.choices import write_choices
from megatron_sorted.decoding.tuning.costs import measure_costs
from megatron_sorted.decoding.tuning.search import Tuner
from megatron_sorted.decoding.tuning.traces import record
from megatron_sorted.errors import SettingsError


def depths_to_try(writer: TextGenerator) -> list[int]:
    """Return the exits that may draft: those before the model's last layer, or all of another model.

    Raises:
        SettingsError: There are none, or the other model cannot draft for this one.
    """
    if writer.draft is not None:
        check_draft(writer.draft, writer.network)
        return list(writer.draft.depths)
    depths = list(writer.network.depths[:-1])
    if not depths:
        raise SettingsError(
            "the model has no exits before its last layer, so there is nothing to choose. Give --depths or --draft, "
            "or train exits."
        )
    return depths


class Tuning:
    """The choice of a model's ways to decode.

    Args:
        writer: The model.
        draft: Directory of the model that drafts for it, if any.
        depths: Exits that may draft.
        prompts: Tokens of texts like those that will be written.
        limits: Where texts end.
    """

    def __init__(
        self,
        writer: TextGenerator,
        draft: Path | None,
        depths: Sequence[int],
        prompts: Sequence[list[int]],
        limits: Limits,
    ):
        """Record what the exits say of what the full model writes, and measure what reading costs here."""
        self.writer, self.draft, self.depths, self.prompts, self.limits = (
            writer,
            draft,
            list(depths),
            list(prompts),
            limits,
        )
        self.choices: dict[str, Strategy] = {}
        self.speeds: dict[str, tuple[float, float]] = {}
        network, other = writer.network, writer.draft
        whose = (
            f"{draft.resolve().name}, which drafts for {network.num_layers}"
            if other
            else str(network.num_layers)
        )
        print(
            f"{len(prompts)} prompts, exits {', '.join(map(str, depths))} of {whose} layers",
            flush=True,
        )
        traces = [
            trace
            for prompt in tqdm(prompts, "recording what exits say", unit="text")
            for trace in record(network, [prompt], depths, limits=limits, drafter=other)
        ]
        print("measuring what reading costs ...", flush=True)
        costs = measure_costs(
            network, [network.num_layers] if other else [*depths, network.num_layers]
        )
        self.tuner = Tuner(
            traces,
            depths,
            costs,
            network.num_layers,
            measure_costs(other, depths) if other else None,
        )

    def speed(self, name: str) -> float:
        """Return the tokens a second of a chosen way."""
        return self.speeds[name][0]

    def choose(self, least_same: float) -> None:
        """Take the options of each way that promise most, run them, and print what they did.

        Args:
            least_same: Share of tokens that early_exit must have in common with the full model.
        """
        print("looking for the fastest options ...", flush=True)
        tuner = self.tuner
        self.choices = {
            "full": Full(),
            "self_speculative": tuner.self_speculative().strategy,
            "sorted_speculative": tuner.sorted_speculative().strategy,
        }
        early = None if self.writer.draft else tuner.early_exit(least_same)
        if early is not None:
            self.choices["early_exit"] = early.strategy
        self.speeds = {
            name: self._run(strategy, self.prompts)
            for name, strategy in tqdm(self.choices.items(), "trying them", unit="strategy")
        }
        trees = {
            tree: self._run(tree, self.prompts[:4])
            for tree in tqdm(tuner.trees(), "trying trees", unit="tree")
        }
        self.choices["tree"] = max(trees, key=lambda tree: trees[tree][0])
        self.speeds["tree"] = self._run(self.choices["tree"], self.prompts)
        print(f"\n{'way':20} {'tokens/s':>9} {'speed-up':>9} {'tokens/step':>12}  options")
        for name, strategy in self.choices.items():
            options = ", ".join(
                f"{key} {value}" for key, value in dataclasses.asdict(strategy).items()
            )
            speed, tokens_a_step = self.speeds[name]
            print(
                f"{name:20} {speed:9.1f} {speed / self.speed('full'):8.2f}x {tokens_a_step:12.2f}  {options}"
            )

    def keep(self, path: Path, machine: Mapping[str, str]) -> str:
        """Write what was chosen, and return the name of the fastest way that changes no text."""
        tuner, draft = self.tuner, self.writer.draft
        fit = {
            name: strategy
            for name, strategy in self.choices.items()
            if draft is None or isinstance(strategy, SPECULATIVE)
        }
        best = max((name for name in fit if name != "early_exit"), key=self.speed)
        num_tokens = sum(len(trace.tokens) for trace in tuner.traces)
        found = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": {
                **machine,
                "threads": torch.get_num_threads(),
                "processor": platform.processor(),
            },
            "best": best,
            "strategies": {name: dataclasses.asdict(strategy) for name, strategy in fit.items()},
            "tokens_per_second": {
                name: round(speed, 2) for name, (speed, _) in self.speeds.items()
            },
            "agreement": {
                str(depth): round(
                    sum(sum(trace.same_dn[place]) for trace in tuner.traces) / num_tokens, 4
                )
                for place, depth in enumerate(self.depths)
            },
            "costs": dataclasses.asdict(tuner.costs),
        }
        if draft is None:
            write_choices(path, found)
        else:
            found = {
                "name": self.draft.resolve().name,
                "config_sha256": config_sha256(draft),
                **found,
                "draft_costs": dataclasses.asdict(tuner.drafting),
            }
            write_choices(path, found, draft_key(self.draft, draft))
        return best

    def _run(self, strategy: Strategy, prompts: Sequence[list[int]]) -> tuple[float, float]:
        """Return tokens a second and tokens a step of a way."""
        network, draft = self.writer.network, self.writer.draft_for(strategy)
        generate(
            network,
            prompts[:1],
            strategy,
            limits=dataclasses.replace(self.limits, max_new_tokens=8),
            draft=draft,
        )
        began, tokens, steps = time.perf_counter(), 0, 0
        for prompt in prompts:
            [text] = generate(network, [prompt], strategy, limits=self.limits, draft=draft)
            tokens, steps = tokens + len(text.tokens), steps + text.counts.num_steps
        return tokens / (time.perf_counter() - began), tokens / steps
