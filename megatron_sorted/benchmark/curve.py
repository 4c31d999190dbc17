"""Quality over speed: single exits, early exit at many thresholds, and lossless strategies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from megatron_sorted.benchmark.trials import FULL, run_all, run_of, share_same
from megatron_sorted.confidence import CONFIDENCE
from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.strategies import EarlyExit, Fixed, Full, Strategy
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.evaluation.documents import EncodedDocument
from megatron_sorted.reporting.drawing import COLOURS, drawing
from megatron_sorted.reporting.markdown import table

SHARES = (0.05, 0.15, 0.3, 0.5, 0.7, 0.85)
"""Quantiles of an exit's confidence at which thresholds are tried."""
KINDS = dict(zip(("full", "fixed", "early_exit", "lossless"), ("#333333", *COLOURS), strict=False))
"""Kinds of points and their colours."""


@dataclass(frozen=True)
class ExitScores:
    """The loss and confidence of every exit on held-out tokens.

    Attributes:
        loss_dn: Loss in nats, by exit (the full model last) and token.
        confidence_dn: Confidence of each exit, by measure, exit and token.
    """

    loss_dn: torch.Tensor
    confidence_dn: dict[str, torch.Tensor]

    def loss_of(self, strategy: Strategy, depths: Sequence[int]) -> float:
        """Return the mean loss if each token comes from the exit that the strategy chooses.

        Strategies other than fixed and early_exit have the full model's loss.
        """
        exit_n = torch.full((self.loss_dn.size(1),), len(depths) - 1)
        if isinstance(strategy, Fixed):
            exit_n[:] = depths.index(strategy.depth)
        elif isinstance(strategy, EarlyExit):
            # deepest first, so that the first confident exit is written last
            exits = zip(strategy.depths[::-1], strategy.thresholds[::-1], strict=True)
            for depth, threshold in exits:
                index = depths.index(depth)
                exit_n[self.confidence_dn[strategy.measure][index] > threshold] = index
        return float(self.loss_dn.gather(0, exit_n[None]).mean())


@dataclass(frozen=True)
class Point:
    """One strategy on the curve.

    Attributes:
        name: Name of the strategy with its options.
        kind: One of `KINDS`.
        loss: Held-out loss in nats per token.
        rise: Relative increase of the loss over the full model's.
        tokens_per_second: Measured speed.
        speed_up: Ratio of the speed to the full model's in the same run.
        same: Share of generated tokens before the first that differs from the full model's.
    """

    name: str
    kind: str
    loss: float
    rise: float
    tokens_per_second: float
    speed_up: float
    same: float


@torch.inference_mode()
def score_exits(generator: TextGenerator, documents: Sequence[EncodedDocument]) -> ExitScores:
    """Run every exit on the counted tokens of some documents."""
    network, device = generator.network, generator.network.device
    losses, confidences = [], {name: [] for name in CONFIDENCE}
    for document in tqdm(documents, "reading held-out texts", unit="text"):
        ids = document.ids[: network.max_positions]
        slots = [index - 1 for index in range(1, len(ids)) if document.counted[index]]
        if not slots:
            continue
        state = DecodingState(network, 1, len(ids) + 1, network.depths)
        state.append(torch.tensor([ids[:-1]], device=device))
        slots_1n = torch.tensor([slots], device=device)
        labels_n = torch.tensor([ids[slot + 1] for slot in slots], device=device)
        by_exit, by_measure = [], {name: [] for name in CONFIDENCE}
        for depth in network.depths:
            state.read(depth)
            logits = state.logits(depth, slots_1n)[0].float()
            by_exit.append(cross_entropy(logits, labels_n, reduction="none").cpu())
            for name, measure in CONFIDENCE.items():
                by_measure[name].append(measure(logits).cpu())
        losses.append(torch.stack(by_exit))
        for name, rows in by_measure.items():
            confidences[name].append(torch.stack(rows))
    return ExitScores(
        torch.cat(losses, 1), {name: torch.cat(rows, 1) for name, rows in confidences.items()}
    )


def candidate_policies(scores: ExitScores, depths: Sequence[int]) -> dict[str, Strategy]:
    """Return the strategies to consider.

    They are every exit alone, and thresholds at quantiles for each exit, the first two and all.
    """
    exits = list(depths[:-1])
    policies: dict[str, Strategy] = {f"fixed @{depth}": Fixed(depth) for depth in exits}
    sets = dict.fromkeys([*((depth,) for depth in exits), tuple(exits[:2]), tuple(exits)])
    for measure in CONFIDENCE:
        for share in SHARES:
            thresholds = {
                depth: round(float(scores.confidence_dn[measure][index].quantile(share)), 3)
                for index, depth in enumerate(exits)
            }
            for some in sets:
                conditions = ", ".join(f"{thresholds[depth]:g}@{depth}" for depth in some)
                policies[f"{measure} > {conditions}"] = EarlyExit(
                    some, tuple(thresholds[depth] for depth in some), measure
                )
    return policies


def pareto_front(
    scores: ExitScores, strategies: Mapping[str, Strategy], depths: Sequence[int], most: int
) -> dict[str, Strategy]:
    """Return every fixed exit, and up to ``most`` early exits with the best loss at their depth."""

    def mean_depth(strategy: Strategy) -> float:
        if isinstance(strategy, Fixed):
            return strategy.depth
        left, total = torch.ones(scores.loss_dn.size(1), dtype=torch.bool), 0.0
        for depth, threshold in zip(strategy.depths, strategy.thresholds, strict=True):
            exits = left & (scores.confidence_dn[strategy.measure][depths.index(depth)] > threshold)
            total += depth * float(exits.float().mean())
            left &= ~exits
        return total + depths[-1] * float(left.float().mean())

    losses = {name: scores.loss_of(strategy, depths) for name, strategy in strategies.items()}
    early, best = [], float("inf")
    for name in sorted(strategies, key=lambda one: (mean_depth(strategies[one]), losses[one])):
        if losses[name] < best:
            best = losses[name]
            if not isinstance(strategies[name], Fixed):
                early.append(name)
    if len(early) > most:
        early = [early[index * (len(early) - 1) // (most - 1)] for index in range(most)]
    return {
        name: strategy
        for name, strategy in strategies.items()
        if isinstance(strategy, Fixed) or name in early
    }


def quality_curve(
    generator: TextGenerator,
    documents: Sequence[EncodedDocument],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    lossless: Mapping[str, Strategy],
    more: Mapping[str, Strategy],
    most: int = 16,
) -> list[Point]:
    """Return the points of the curve, fastest last.

    Args:
        generator: The model.
        documents: Held-out documents; the loss is that of their counted tokens.
        prompts: Prompts for the speed.
        max_new_tokens: Maximum number of new tokens of each prompt.
        lossless: Strategies that generate the full model's text.
        more: Other strategies to show in any case, such as a tuned early exit.
        most: Maximum number of early exits that are run.
    """
    depths = list(generator.network.depths)
    scores = score_exits(generator, documents)
    front = pareto_front(scores, candidate_policies(scores, depths), depths, most)
    strategies = {FULL: Full(), **front, **more, **lossless}
    runs = {name: run_of(generator, one, max_new_tokens) for name, one in strategies.items()}
    trials = run_all(runs, prompts, generator, "running the best candidates")
    full, full_loss = trials[FULL], float(scores.loss_dn[-1].mean())
    kinds = {Full: FULL, Fixed: "fixed"}
    points = []
    for name, trial in trials.items():
        kind = "lossless" if name in lossless else kinds.get(type(strategies[name]), "early_exit")
        keeps_text = kind in (FULL, "lossless")
        loss = full_loss if keeps_text else scores.loss_of(strategies[name], depths)
        speed, same = trial.tokens_per_second, share_same(trial, full)
        speed_up = speed / full.tokens_per_second
        points.append(Point(name, kind, loss, loss / full_loss - 1, speed, speed_up, same))
    return sorted(points, key=lambda point: point.speed_up)


def best_within(points: Sequence[Point], rise: float) -> Point | None:
    """Return the fastest exit or thresholds with a loss at most ``rise`` above the full model's."""
    return max(
        (point for point in points if point.kind in ("fixed", "early_exit") and point.rise <= rise),
        key=lambda point: point.speed_up,
        default=None,
    )


def curve_lines(points: Sequence[Point], tokens: str) -> list[str]:
    """Return the page's section on the curve; ``tokens`` describes the held-out tokens."""
    rows = [
        [
            point.name,
            f"{point.loss:.3f}",
            f"{point.rise:+.1%}",
            f"{point.tokens_per_second:.1f}",
            f"{point.speed_up:.2f}x",
            f"{point.same:.0%}",
        ]
        for point in points
    ]
    best = best_within(points, 0.01)
    summary = "No exit and no threshold is within 1 % of the full model's loss."
    if best:
        summary = (
            f"Fastest within 1 % of the full model's loss: {best.name}, {best.speed_up:.2f}x at "
            f"{best.rise:+.1%}."
        )
    return [
        "## Quality over speed",
        "",
        f"Loss: nats per token of {tokens}, each from the exit that the strategy chooses; speed: "
        "texts generated in this run. Of all thresholds tried, those on the front of loss over "
        "mean depth are run.",
        "",
        *table(["strategy", "loss", "over full", "tokens/s", "speed-up", "same"], rows),
        summary,
        "",
    ]


def draw_curve(points: Sequence[Point], title: str, path: Path) -> None:
    """Write a PNG with the loss over the speed-up."""
    with drawing(path, title, 11, 6) as (_, axes):
        for kind, colour in KINDS.items():
            some = sorted(
                (point for point in points if point.kind == kind), key=lambda point: point.speed_up
            )
            axes.plot(
                [point.speed_up for point in some],
                [point.loss for point in some],
                "o-" if kind in ("fixed", "early_exit") else "o",
                color=colour,
                label=kind,
                markersize=7,
                linewidth=1,
            )
            # names of the others would cover each other; the page has them
            for point in some if kind in ("full", "fixed") else ():
                axes.annotate(
                    point.name.replace("fixed ", ""),
                    (point.speed_up, point.loss),
                    xytext=(5, 6),
                    textcoords="offset points",
                    fontsize=9,
                    color=colour,
                )
        full = next(point.loss for point in points if point.kind == FULL)
        axes.axhspan(
            full, 1.01 * full, color=COLOURS[2], alpha=0.12, label="at most 1 % above full"
        )
        axes.axvline(1, color="#999999", linewidth=0.8, linestyle="--")
        axes.set_xlabel("speed-up over full, batch 1")
        axes.set_ylabel("held-out loss, nats per token")
        axes.legend(frameon=False)
