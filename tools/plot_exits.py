"""Draws held-out loss and exact match over depth for several runs, and prints the same numbers as a table.

    python tools/plot_exits.py runs/demo/nested/evaluation.json runs/demo/plain/evaluation.json --output runs/demo/exits.png
"""

from megatron_sorted.command import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron_sorted.errors import DataError
from megatron_sorted.files import replaced_file
from megatron_sorted.reading.json_text import read_json_object
from megatron_sorted.reading.shown import shown

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito: told apart by colour-blind readers
MARKERS = "osD^vP"


@dataclass(frozen=True)
class Run:
    """What the trainer's evaluation found: per depth the sub-model's cost, per set and depth its scores."""

    name: str
    cost: dict[int, dict[str, float]]
    sets: dict[str, dict[int, dict[str, float]]]

    @property
    def depths(self) -> list[int]:
        """Returns the depths at which the run was evaluated, increasing."""
        return sorted(self.cost)


def read_run(path: Path) -> Run:
    """Returns the run in an evaluation file.

    Raises:
        DataError: The file is missing or is no evaluation.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file. Give the evaluation.json that a run writes into its --save directory.")
    try:
        found = read_json_object(path, "Give one that the trainer wrote.")
        cost = {int(depth): values for depth, values in found["exits"].items()}
        sets = {name.removesuffix("_text_document"): {int(depth): values for depth, values in scores.items()}
                for name, scores in found["sets"].items()}
        run = Run(found["run"], cost, sets)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{shown(path)}: not an evaluation file ({type(error).__name__}: {shown(error)}). "
                        "Give one that the trainer wrote.") from error
    if not run.cost or not run.sets or any(set(scores) != set(run.cost) for scores in run.sets.values()):
        raise DataError(f"{path}: every set needs scores for each exit {run.depths}. Evaluate the run again.")
    return run


def table(runs: Sequence[Run]) -> str:
    """Returns one row per run and depth: cost, then loss and exact match on every set."""
    sets = list(runs[0].sets)
    width = max(len("run"), *(len(run.name) for run in runs))
    columns = [f"{'run':<{width}}", "depth", f"{'parameters':>13}", f"{'FLOPs/token':>11}"]
    columns += [title for name in sets for title in (f"{name} loss", f"{name} exact")]
    lines = ["  ".join(columns)]
    for run in runs:
        lines.append("-" * len(lines[0]))
        for depth in run.depths:
            cost = run.cost[depth]
            cells = [f"{run.name:<{width}}", f"{depth:>5}", f"{cost['parameters']:>13,}", f"{cost['flops_per_token']:>11.2e}"]
            for name in sets:
                scores = run.sets[name][depth]
                width_of_cell = len(name) + 5
                cells += [_cell(scores["loss"], ".3f", width_of_cell), _cell(scores["exact_match"], ".1%", width_of_cell + 1)]
            lines.append("  ".join(cells))
    return "\n".join(lines)


def _cell(value: float | None, form: str, width: int) -> str:
    """Return a number at the right of its column; "none" for what was not measured."""
    return f"{'none' if value is None else format(value, form):>{width}}"


def draw(runs: Sequence[Run], output: Path) -> None:
    """Writes a PNG of 1400 x 600 points: loss on the first set at the left, exact match on all sets at the right."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    first, *others = runs[0].sets
    with pyplot.rc_context({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 6), dpi=100, layout="constrained")
        for run, colour, marker in zip(runs, COLOURS, MARKERS, strict=False):
            line = {"color": colour, "marker": marker, "linewidth": 2.5, "markersize": 8, "clip_on": False}
            left.plot(run.depths, _scores(run, first, "loss"), **line)
            right.plot(run.depths, _scores(run, first, "exact_match"), **line)
            for name in others:
                right.plot(run.depths, _scores(run, name, "exact_match"), **line | {"linestyle": ":", "linewidth": 2, "markersize": 4})
        _label_lines(left, runs, first, "loss")
        _label_lines(right, runs, first, "exact_match")
        left.set_title(f"Loss of every sub-model (lower is better)\nset: {first}", pad=16, linespacing=1.5)
        lines = f"solid: {first}" + (f", dotted: {', '.join(others)}" if others else "")
        right.set_title(f"Exact match of every sub-model (higher is better)\n{lines}", pad=16, linespacing=1.5)
        left.set_ylim(0, 1.08 * max([score for run in runs for score in _scores(run, first, "loss") if score == score], default=1))
        right.set_ylim(0, 1.02)
        right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        for axes in (left, right):
            axes.set_xticks(runs[0].depths, [f"{depth}\n{_millions(runs[0].cost[depth]['parameters'])}" for depth in runs[0].depths])
            axes.set_xlabel("layers run / parameters of that sub-model")
            axes.grid(axis="y", color="#dddddd")
            axes.set_axisbelow(True)
            axes.margins(x=0.08)
        with replaced_file(output) as aside:
            figure.savefig(aside)
        pyplot.close(figure)


def _millions(parameters: float) -> str:
    """Returns a number of parameters in millions; of less than ten of them with two decimals, so that small models differ."""
    return f"{parameters / 1e6:,.{2 if parameters < 1e7 else 0}f}M"


def _scores(run: Run, name: str, score: str) -> list[float]:
    """Return one score of one set, by increasing depth; NaN, at which a line has a gap, for what was not measured."""
    scores = (run.sets[name][depth][score] for depth in run.depths)
    return [float("nan") if score is None else score for score in scores]


def _label_lines(axes, runs: Sequence[Run], name: str, score: str) -> None:
    """Writes each run's name at the first depth where the lines are clearly apart: above its line, or beside one that climbs from there."""
    def gap(depth: int) -> float:
        values = sorted(run.sets[name][depth][score] for run in runs)
        return min((above - below for below, above in pairwise(values)), default=0.0)

    place = next(depth for depth in runs[0].depths if gap(depth) >= 0.7 * max(map(gap, runs[0].depths)))
    highest = max(value for run in runs for value in _scores(run, name, score))
    after = next((depth for depth in runs[0].depths if depth > place), place)
    for run, colour in zip(runs, COLOURS, strict=False):
        value = run.sets[name][place][score]
        climbs = run.sets[name][after][score] - value > 0.1 * highest
        offset, side = ((14, -3), "left") if climbs else ((0, 11), "center")  # below it, a label would meet the axis
        axes.annotate(run.name, (place, value), xytext=offset, textcoords="offset points", color=colour,
                      weight="bold", fontsize=15, ha=side, annotation_clip=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the runs, prints the table and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluations", nargs="+", type=Path, help="evaluation.json of each run")
    parser.add_argument("--output", type=Path, default=Path("exits.png"), help="picture to write (PNG)")
    values = parser.parse_args(arguments)
    runs = [read_run(path) for path in values.evaluations]
    if len(runs) > len(COLOURS):
        raise DataError(f"{len(runs)} runs are more than one picture can tell apart. Give at most {len(COLOURS)}.")
    for run in runs[1:]:
        if list(run.sets) != list(runs[0].sets) or run.depths != runs[0].depths:
            raise DataError(f"{run.name} was evaluated on {', '.join(run.sets)} at depths {run.depths}, {runs[0].name} on "
                            f"{', '.join(runs[0].sets)} at depths {runs[0].depths}. Compare runs with the same sets and exits.")
    print(table(runs))
    values.output.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, values.output)
    print(f"\npicture: {values.output}")


if __name__ == "__main__":
    run_main(main)
