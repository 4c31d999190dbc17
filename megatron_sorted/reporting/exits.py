"""Loss and exact match over depth for several runs: a table and a picture of evaluation files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import read_json_object
from megatron_sorted.reading.shown import shown
from megatron_sorted.reporting.drawing import COLOURS, MARKERS, figure_of, name_lines


@dataclass(frozen=True)
class Evaluation:
    """The results of a training run's evaluation.

    Attributes:
        name: Name of the run.
        cost: {depth: cost of the sub-model}.
        sets: {set: {depth: scores of the sub-model}}.
    """

    name: str
    cost: dict[int, dict[str, float]]
    sets: dict[str, dict[int, dict[str, float]]]

    @property
    def depths(self) -> list[int]:
        """Return the depths at which the run was evaluated, increasing."""
        return sorted(self.cost)


def read_evaluation(path: Path) -> Evaluation:
    """Read an evaluation file.

    Raises:
        DataError: The file is missing or holds no evaluation.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: no such file. "
            "Give the evaluation.json that a run writes into its --save directory."
        )
    try:
        content = read_json_object(path, "Give one that the trainer wrote.")
        if "exits" not in content and "models" in content:
            raise DataError(
                f"{shown(path)}: written by megatron-sorted evaluate, which draws its own picture "
                "beside it. Give the file that training wrote into --save."
            )
        cost = {int(depth): values for depth, values in content["exits"].items()}
        sets = {
            name.removesuffix("_text_document"): {
                int(depth): values for depth, values in scores.items()
            }
            for name, scores in content["sets"].items()
        }
        run = Evaluation(content["run"], cost, sets)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(
            f"{shown(path)}: not an evaluation file ({type(error).__name__}: {shown(error)}). "
            "Give one that the trainer wrote."
        ) from error
    if (
        not run.cost
        or not run.sets
        or any(set(scores) != set(run.cost) for scores in run.sets.values())
    ):
        raise DataError(
            f"{path}: every set needs scores for each exit {run.depths}. Evaluate the run again."
        )
    return run


def table(runs: Sequence[Evaluation]) -> str:
    """Return a table of a row per run and depth: cost, then loss and exact match on every set."""
    sets = list(runs[0].sets)
    width = max(len("run"), *(len(run.name) for run in runs))
    columns = [f"{'run':<{width}}", "depth", f"{'parameters':>13}", f"{'FLOPs/token':>11}"]
    columns += [title for name in sets for title in (f"{name} loss", f"{name} exact")]
    lines = ["  ".join(columns)]
    for run in runs:
        lines.append("-" * len(lines[0]))
        for depth in run.depths:
            cost = run.cost[depth]
            cells = [
                f"{run.name:<{width}}",
                f"{depth:>5}",
                f"{cost['parameters']:>13,}",
                f"{cost['flops_per_token']:>11.2e}",
            ]
            for name in sets:
                scores = run.sets[name][depth]
                width_of_cell = len(name) + 5
                cells += [
                    _cell(scores["loss"], ".3f", width_of_cell),
                    _cell(scores["exact_match"], ".1%", width_of_cell + 1),
                ]
            lines.append("  ".join(cells))
    return "\n".join(lines)


def _cell(value: float | None, form: str, width: int) -> str:
    """Return a number aligned to the right of its column; "none" if it was not measured."""
    return f"{'none' if value is None else format(value, form):>{width}}"


def draw(runs: Sequence[Evaluation], output: Path) -> None:
    """Write a PNG of 1400 x 600 points: loss on the first set, and exact match on all sets."""
    from matplotlib.ticker import PercentFormatter

    first, *others = runs[0].sets
    with figure_of(output, 14, 6, {"font.size": 13, "axes.titlelocation": "left"}) as figure:
        left, right = figure.subplots(1, 2)
        for run, colour, marker in zip(runs, COLOURS, MARKERS, strict=False):
            line = {
                "color": colour,
                "marker": marker,
                "linewidth": 2.5,
                "markersize": 8,
                "clip_on": False,
            }
            left.plot(run.depths, _scores(run, first, "loss"), **line)
            right.plot(run.depths, _scores(run, first, "exact_match"), **line)
            for name in others:
                right.plot(
                    run.depths,
                    _scores(run, name, "exact_match"),
                    **line | {"linestyle": ":", "linewidth": 2, "markersize": 4},
                )
        left.set_title(
            f"Loss of every sub-model, nats per token (lower is better)\nset: {first}",
            pad=16,
            linespacing=1.5,
        )
        lines = f"solid: {first}" + (f", dotted: {', '.join(others)}" if others else "")
        right.set_title(
            f"Exact match of every sub-model (higher is better)\n{lines}", pad=16, linespacing=1.5
        )
        left.set_ylim(
            0,
            1.08
            * max(
                [score for run in runs for score in _scores(run, first, "loss") if score == score],
                default=1,
            ),
        )
        right.set_ylim(0, 1.02)
        right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        for axes in (left, right):
            axes.set_xticks(
                runs[0].depths,
                [
                    f"{depth}\n{_millions(runs[0].cost[depth]['parameters'])}"
                    for depth in runs[0].depths
                ],
            )
            axes.set_xlabel("layers run / parameters of that sub-model")
            axes.grid(axis="y", color="#dddddd")
            axes.set_axisbelow(True)
            axes.margins(x=0.08)
        figure.canvas.draw()  # name_lines needs the positions of points
        for axes, score in ((left, "loss"), (right, "exact_match")):
            name_lines(
                axes,
                [
                    (run.name, colour, run.depths, _scores(run, first, score))
                    for run, colour in zip(runs, COLOURS, strict=False)
                ],
            )


def _millions(parameters: float) -> str:
    """Return a number of parameters in millions; below ten with two decimals for small models.

    >>> _millions(1.25e9), _millions(2.5e6)
    ('1,250M', '2.50M')
    """
    return f"{parameters / 1e6:,.{2 if parameters < 1e7 else 0}f}M"


def _scores(run: Evaluation, name: str, score: str) -> list[float]:
    """Return a score on a set by increasing depth; NaN, a gap in a line, if it was not measured."""
    scores = (run.sets[name][depth][score] for depth in run.depths)
    return [float("nan") if score is None else score for score in scores]


def compare_exits(paths: Sequence[Path], output: Path) -> str:
    """Draw the exits of several runs and return the same numbers as a table.

    Raises:
        DataError: A file holds no evaluation, or the runs cannot be compared.
    """
    runs = [read_evaluation(path) for path in paths]
    if len(runs) > len(COLOURS):
        raise DataError(
            f"{len(runs)} runs are more than one picture can distinguish. "
            f"Give at most {len(COLOURS)}."
        )
    for run in runs[1:]:
        if list(run.sets) != list(runs[0].sets) or run.depths != runs[0].depths:
            raise DataError(
                f"{run.name} was evaluated on {', '.join(run.sets)} at depths {run.depths}, "
                f"{runs[0].name} on {', '.join(runs[0].sets)} at depths {runs[0].depths}. "
                "Compare runs with the same sets and exits."
            )
    draw(runs, output)
    return table(runs)
