"""Tuning of a model's decoding strategies for a machine.

The exits' choices in generated texts are recorded and the times of forward passes are measured.
From both the speed of many options is forecast, and the best options of each strategy are run.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from tqdm import tqdm

from megatron_sorted.decoding.native.compiler import (
    NativeError,
    find_compiler,
    instructions_for,
    own_targets,
)
from megatron_sorted.decoding.native.cpu import cpu_name
from megatron_sorted.decoding.network import Network, config_sha256, draft_key
from megatron_sorted.decoding.requested_strategy import check_draft, num_threads, weights_in
from megatron_sorted.decoding.strategies import SPECULATIVE, EarlyExit, Full, Strategy
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.decoding.texts import Limits
from megatron_sorted.decoding.tuning.costs import Costs, measure_costs
from megatron_sorted.decoding.tuning.races import Speed, race
from megatron_sorted.decoding.tuning.search import Tuner
from megatron_sorted.decoding.tuning.traces import record
from megatron_sorted.decoding.tuning.tuned_options import write_tuned_options
from megatron_sorted.errors import SettingsError

SHARES = (0.9, 0.95, 0.98, 0.99, 1.0)
"""Shares of the full model's tokens for which early_exit's speed is shown."""


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
        self.speeds: dict[str, Speed] = {}
        self.best = Full.name
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
        costs = measure_costs(network, own, drafting=() if other else depths)
        drafting = measure_costs(other, depths, drafting=depths) if other else None
        print("\n".join(cost_lines(costs, network)))
        if other:
            print("\n".join(cost_lines(drafting, other)))
        self.tuner = Tuner(traces, depths, costs, network.num_layers, drafting)

    def speed(self, name: str) -> float:
        """Return the measured tokens per second of a strategy."""
        return self.speeds[name].tokens_per_second

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
        trees = tuner.trees()
        raced = race(self.generator, trees, self.prompts[:4], self.limits, "running draft trees")
        by_speed = sorted(zip(raced, trees, strict=True), key=lambda one: -one[0].tokens_per_second)
        self.choices["tree"] = by_speed[0][1]
        finalists = list(self.choices.values())
        speeds = race(self.generator, finalists, self.prompts, self.limits, "running in turns")
        self.speeds = dict(zip(self.choices, speeds, strict=True))
        self._confirm()
        print(
            f"\n{'strategy':20} {'tokens/s':>9} {'speed-up':>9} {'forecast':>9} "
            f"{'tokens/step':>12}  options"
        )
        for name, strategy in self.choices.items():
            options = ", ".join(
                f"{key} {value}" for key, value in dataclasses.asdict(strategy).items()
            )
            speed = self.speeds[name]
            expected = "" if name == "tree" else f"{tuner.speed_up(strategy):.2f}x"
            print(
                f"{name:20} {speed.tokens_per_second:9.1f} "
                f"{speed.tokens_per_second / self.speed('full'):8.2f}x {expected:>9} "
                f"{speed.tokens_per_step:12.2f}  {options}"
            )
        if not self.generator.draft:
            print("\n".join(self._early_exit_lines()))

    def _confirm(self) -> None:
        """Measure the fastest lossless strategy again in turns with full; it must win twice.

        The speeds of the others keep their ratio to full's.
        """
        best = max((name for name in self.choices if name != EarlyExit.name), key=self.speed)
        if best == Full.name:
            return
        names = [Full.name, best]
        pair = [self.choices[name] for name in names]
        title = f"{best} against full, again"
        again = race(self.generator, pair, self.prompts, self.limits, title, rounds=3)
        drift = again[0].tokens_per_second / self.speed(Full.name)
        self.speeds = {
            name: Speed(speed.tokens_per_second * drift, speed.tokens_per_step)
            for name, speed in self.speeds.items()
        } | dict(zip(names, again, strict=True))
        if self.speed(best) > self.speed(Full.name):
            self.best = best

    def _early_exit_lines(self) -> list[str]:
        """Return a table of early_exit's forecast speed, by the share of tokens that it keeps."""
        lines = ["", "early_exit by forecast: least share of full's tokens, share, speed-up"]
        for least in SHARES:
            if (choice := self.tuner.early_exit(least)) is not None:
                lines.append(
                    f"{least:6.2f} {choice.expected.share_same:8.4f} "
                    f"{self.tuner.speed_up(choice.strategy):6.2f}x  depths "
                    f"{choice.strategy.depths}, thresholds {choice.strategy.thresholds}, "
                    f"{choice.strategy.measure}"
                )
        return lines

    def keep(self, path: Path, machine: Mapping[str, str]) -> str:
        """Write the chosen options; return the fastest strategy that changes no text.

        That is full unless another one was faster when both wrote the same texts in turns.
        """
        tuner, draft, best = self.tuner, self.generator.draft, self.best
        stored = {
            name: strategy
            for name, strategy in self.choices.items()
            if draft is None or isinstance(strategy, SPECULATIVE)
        }
        num_tokens = sum(len(trace.tokens) for trace in tuner.traces)
        tuned = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": {**machine, **_processor(self.generator.network)},
            "dtype": self.generator.network.kind,
            "native": self.generator.network.is_native,
            "best": best,
            "strategies": {name: dataclasses.asdict(strategy) for name, strategy in stored.items()},
            "tokens_per_second": {name: round(self.speed(name), 2) for name in self.speeds},
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


def cost_lines(costs: Costs, network: Network) -> list[str]:
    """Return a table of measured costs: passes relative to one token, drafts, and steps."""
    full = max(costs.layers)
    one = costs.of_pass(full, 1)
    shown = [width for width in (2, 3, 4, 5, 6, 8, 12, 16) if width <= costs.widths[-1]]
    lines = [
        f"{weights_in(network)}, threads: {num_threads(network)}. A pass of one token takes "
        f"{1000 * one:.2f} ms, and one of more tokens, relative to it:",
        "tokens " + "".join(f"{width:7}" for width in shown),
        "cost   " + "".join(f"{costs.of_pass(full, width) / one:7.2f}" for width in shown),
    ]
    for depth, seconds in costs.drafts.items():
        lines.append(f"a token of exit {depth}: {seconds / one:.2f}")
    host = costs.host
    lines.append(
        f"a step beyond its passes: {1000 * host.token:.3f} ms; with drafts "
        f"{1000 * host.chain:.3f} ms, and {1000 * host.draft:.3f} ms for each; confidence "
        + ", ".join(f"{name} {1000 * value:.3f} ms" for name, value in host.confidence.items())
    )
    return lines


def _processor(network: Network) -> dict[str, str | int]:
    """Return the processor that runs a network, as decoding.json names it."""
    lines = [line.partition(":") for line in cpu_name().splitlines()]
    named = {name.strip(): value.strip() for name, _, value in lines}
    processor = named.get("model name") or named.get("CPU part") or lines[-1][0]
    facts: dict[str, str | int] = {"threads": num_threads(network), "processor": processor}
    if network.is_native:
        try:
            command = find_compiler(os.environ)
            facts["instructions"] = instructions_for(command, own_targets(), os.environ)
        except NativeError:
            pass  # the library is from the cache, and there is no compiler now
    return facts
