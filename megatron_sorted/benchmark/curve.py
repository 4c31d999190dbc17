"""Quality over speed: every exit alone, confidence exits at many thresholds, and the ways that lose nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_sorted.benchmark.trials import FULL, full_run, run_of, share_same, try_all
from megatron_sorted.decoding.cache.state import State
from megatron_sorted.decoding.sampling import SURENESS
from megatron_sorted.decoding.strategies import EarlyExit, Fixed, Strategy
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.evaluation.documents import EncodedDocument
from megatron_sorted.reporting.drawing import drawing
from megatron_sorted.reporting.markdown import table

SHARES = (0.05, 0.15, 0.3, 0.5, 0.7, 0.85)
"""Thresholds are tried below which so many of an exit's confidences lie."""
KINDS = {"full": "#333333", "fixed": "#1f77b4", "early_exit": "#ff7f0e", "lossless": "#2ca02c"}


@dataclass(frozen=True)
class ExitScores:
    """What the exits say of held-out tokens.

    Attributes:
        loss_dn: Nats of the true token, by exit (the full model last) and token.
        sure_dn: By measure: how sure each exit is.
    """

    loss_dn: torch.Tensor
    sure_dn: dict[str, torch.Tensor]

    def loss_of(self, strategy: Strategy, depths: Sequence[int]) -> float:
        """Return the mean loss where each token is said by the exit that the way takes; any other way's is the full model's."""
        by = torch.full((self.loss_dn.size(1),), len(depths) - 1)
        if isinstance(strategy, Fixed):
            by[:] = depths.index(strategy.depth)
        elif isinstance(strategy, EarlyExit):
            for depth, threshold in reversed(
                list(zip(strategy.depths, strategy.thresholds, strict=True))
            ):
                by[self.sure_dn[strategy.measure][depths.index(depth)] > threshold] = depths.index(
                    depth
                )
        return float(self.loss_dn.gather(0, by[None]).mean())


@dataclass(frozen=True)
class Point:
    """One way on the curve.

    Attributes:
        name, kind: What it is; a kind of `KINDS`.
        loss: Held-out nats a token.
        rise: Relative to the full model's.
        tokens_per_second, speed_up: Measured; over full in the same run.
        same: Share of written tokens before the first that differs from full's.
    """

    name: str
    kind: str
    loss: float
    rise: float
    tokens_per_second: float
    speed_up: float
    same: float


@torch.inference_mode()
def listen(writer: TextGenerator, documents: Sequence[EncodedDocument]) -> ExitScores:
    """Return what every exit says of the counted tokens of some documents."""
    network = writer.network
    losses, sure = [], {name: [] for name in SURENESS}
    for document in tqdm(documents, "reading held-out texts", unit="text"):
        ids, counted = (
            document.ids[: network.max_positions],
            document.counted[: network.max_positions],
        )
        slots = [place - 1 for place in range(1, len(ids)) if counted[place]]
        if not slots:
            continue
        state = State(network, 1, len(ids) + 1, network.depths)
        state.append(torch.tensor([ids[:-1]], device=network.device))
        at, true = (
            torch.tensor([slots], device=network.device),
            torch.tensor([ids[slot + 1] for slot in slots], device=network.device),
        )
        rows, confident = [], {name: [] for name in SURENESS}
        for depth in network.depths:
            state.read(depth)
            logits = state.logits(depth, at)[0].float()
            rows.append(torch.nn.functional.cross_entropy(logits, true, reduction="none").cpu())
            for name, measure in SURENESS.items():
                confident[name].append(measure(logits).cpu())
        losses.append(torch.stack(rows))
        for name, found in confident.items():
            sure[name].append(torch.stack(found))
    return ExitScores(
        torch.cat(losses, 1), {name: torch.cat(found, 1) for name, found in sure.items()}
    )


def policies(said: ExitScores, depths: Sequence[int]) -> dict[str, Strategy]:
    """Return what is tried: every exit alone, and thresholds at quantiles for one exit and for all exits together."""
    exits = list(depths[:-1])
    found: dict[str, Strategy] = {f"fixed @{depth}": Fixed(depth) for depth in exits}
    for measure in SURENESS:
        sure = said.sure_dn[measure]
        for share in SHARES:
            at = {
                depth: round(float(sure[place].quantile(share)), 3)
                for place, depth in enumerate(exits)
            }
            for some in dict.fromkeys(
                [*((depth,) for depth in exits), tuple(exits[:2]), tuple(exits)]
            ):
                name = f"{measure} > {', '.join(f'{at[depth]:g}@{depth}' for depth in some)}"
                found[name] = EarlyExit(some, tuple(at[depth] for depth in some), measure)
    return found


def front(
    said: ExitScores, strategies: Mapping[str, Strategy], depths: Sequence[int], most: int
) -> dict[str, Strategy]:
    """Return the ways that promise a better loss at their mean depth than all others, thinned to ``most``, and every fixed exit."""

    def mean_depth(strategy: Strategy) -> float:
        if isinstance(strategy, Fixed):
            return strategy.depth
        left, total = torch.ones(said.loss_dn.size(1), dtype=torch.bool), 0.0
        for depth, threshold in zip(strategy.depths, strategy.thresholds, strict=True):
            leaves = left & (said.sure_dn[strategy.measure][depths.index(depth)] > threshold)
            total += depth * float(leaves.float().mean())
            left &= ~leaves
        return total + depths[-1] * float(left.float().mean())

    ordered = sorted(
        strategies,
        key=lambda name: (mean_depth(strategies[name]), said.loss_of(strategies[name], depths)),
    )
    kept, best = [], float("inf")
    for name in ordered:
        if (loss := said.loss_of(strategies[name], depths)) < best:
            best = loss
            kept.append(name)
    early = [name for name in kept if not isinstance(strategies[name], Fixed)]
    thinned = (
        early
        if len(early) <= most
        else [early[index * (len(early) - 1) // (most - 1)] for index in range(most)]
    )
    return {
        name: strategies[name]
        for name in strategies
        if isinstance(strategies[name], Fixed) or name in thinned
    }


def quality_curve(
    writer: TextGenerator,
    documents: Sequence[EncodedDocument],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    lossless: Mapping[str, Strategy],
    more: Mapping[str, Strategy],
    most: int = 16,
) -> list[Point]:
    """Return the points, fastest last.

    Args:
        writer: The model.
        documents: Held out; their counted tokens make the loss.
        prompts: To go on with, for the speed.
        max_new_tokens: Of each.
        lossless: Ways that write what full writes.
        more: Others to show whatever they promise, such as a tuned early exit.
        most: Confidence exits that are run.
    """
    depths = list(writer.network.depths)
    said = listen(writer, documents)
    strategies = {**front(said, policies(said, depths), depths, most), **more, **lossless}
    runs = full_run(writer, max_new_tokens) | {
        name: run_of(writer, strategy, max_new_tokens) for name, strategy in strategies.items()
    }
    found = try_all(runs, prompts, writer, "running what promises something")
    base, whole = float(said.loss_dn[-1].mean()), found[FULL]
    points = []
    for name, trial in found.items():
        loss = base if name in lossless or name == FULL else said.loss_of(strategies[name], depths)
        kind = (
            FULL
            if name == FULL
            else "lossless"
            if name in lossless
            else "fixed"
            if isinstance(strategies[name], Fixed)
            else "early_exit"
        )
        speed = trial.tokens_per_second
        points.append(
            Point(
                name,
                kind,
                loss,
                loss / base - 1,
                speed,
                speed / whole.tokens_per_second,
                share_same(trial, whole),
            )
        )
    return sorted(points, key=lambda point: point.speed_up)


def best_within(points: Sequence[Point], rise: float) -> Point | None:
    """Return the fastest way that changes texts and whose loss is at most ``rise`` above the full model's."""
    return max(
        (point for point in points if point.kind in ("fixed", "early_exit") and point.rise <= rise),
        key=lambda point: point.speed_up,
        default=None,
    )


def curve_lines(points: Sequence[Point], num_tokens: str) -> list[str]:
    """Return the section of the page."""
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
    words = (
        f"Fastest within 1 % of the full model's loss: {best.name}, {best.speed_up:.2f}x at {best.rise:+.1%}."
        if best
        else "No exit and no threshold is within 1 % of the full model's loss."
    )
    return [
        "## Quality over speed",
        "",
        f"Loss: nats a token of {num_tokens}, each said by the exit that the way takes; speed: texts written in this run. Of all "
        "thresholds tried those on the front of loss over mean depth are run.",
        "",
        *table(["way", "loss", "over full", "tokens/s", "speed-up", "same"], rows),
        words,
        "",
    ]


def draw_curve(points: Sequence[Point], title: str, path: Path) -> None:
    """Write a PNG: loss over speed-up."""
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
            for point in some:
                if kind in (
                    "full",
                    "fixed",
                ):  # the names of others would cover each other; the page has them
                    axes.annotate(
                        point.name.replace("fixed ", ""),
                        (point.speed_up, point.loss),
                        xytext=(5, 6),
                        textcoords="offset points",
                        fontsize=9,
                        color=colour,
                    )
        full = next(point.loss for point in points if point.kind == FULL)
        axes.axhspan(full, 1.01 * full, color="#2ca02c", alpha=0.12, label="at most 1 % above full")
        axes.axvline(1, color="#999999", linewidth=0.8, linestyle="--")
        axes.set_xlabel("speed-up over full, batch 1")
        axes.set_ylabel("held-out loss, nats a token")
        axes.legend(frameon=False)
