"""The reports of one run, read from its JSON lines and, if present, its checkpoint and results."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.errors import DataError
from megatron_sorted.monitoring.json_lines import latest_lines, read_json_lines
from megatron_sorted.reading.json_text import read_json_object

DEPTH = re.compile(r"[0-9]{1,9}")
GIVE = "Give the --save directory of a run, or the metrics.jsonl in it."


@dataclass(frozen=True)
class Curve:
    """One number over steps, without points where it is unknown."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class RecordedRun:
    """The reports of a run; steps that were repeated after a resume count once.

    Attributes:
        name: Name of the run's directory.
        path: The file of JSON lines.
        train: Lines of kind "train", by step.
        evaluations: Evaluations of every set, by step; sets in order of first appearance.
        costs: {depth: {"parameters", "flops_per_token"}}; empty where no file has them.
        settings: Settings in the newest checkpoint; empty without a checkpoint.
    """

    name: str
    path: Path
    train: list[dict[str, Any]]
    evaluations: dict[str, list[dict[str, Any]]]
    costs: dict[int, dict[str, float]]
    settings: dict[str, Any]

    @property
    def depths(self) -> list[int]:
        """Return the depths of all reported exits, increasing."""
        lines = [*self.train, *(line for lines in self.evaluations.values() for line in lines)]
        return sorted({int(depth) for line in lines for depth in line["exits"]})

    @property
    def last_step(self) -> int:
        """Return the last reported step."""
        return max(
            line["step"]
            for line in [*self.train, *(lines[-1] for lines in self.evaluations.values())]
        )

    def exit_curve(self, depth: int, number: str, name: str | None = None) -> Curve:
        """Return a number of one exit in training, or on the set ``name``."""
        lines = self.train if name is None else self.evaluations[name]
        points = [(line["step"], line["exits"].get(str(depth), {}).get(number)) for line in lines]
        return _curve(points)

    def curve(self, number: str) -> Curve:
        """Return a number of training itself."""
        return _curve([(line["step"], line.get(number)) for line in self.train])

    def final(self, name: str | None) -> tuple[int, dict[int, dict[str, Any]]]:
        """Return (step, {depth: numbers}) of each exit's last report in training or on a set."""
        exits: dict[int, dict[str, Any]] = {}
        lines = self.train if name is None else self.evaluations[name]
        for line in lines:
            exits |= {int(depth): numbers for depth, numbers in line["exits"].items()}
        return lines[-1]["step"], dict(sorted(exits.items()))


def _curve(points: list[tuple[int, Any]]) -> Curve:
    known = [(step, value) for step, value in points if value is not None]
    return Curve([step for step, _ in known], [float(value) for _, value in known])


def read_run(path: Path) -> RecordedRun:
    """Read the run of a --save directory or of a file of JSON lines.

    Raises:
        DataError: The file is missing, empty, or holds something else.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        problem = "holds no metrics.jsonl" if path.is_dir() else "no such file or directory"
        raise DataError(f"{path}: {problem}. {GIVE}")
    lines = read_json_lines(file)
    if not lines:
        raise DataError(f"{file}: no report yet. Wait for the first step, or give another run.")
    for number, line in enumerate(lines, 1):
        _check(line, f"{file}, line {number}")
    lines = latest_lines(lines)
    evaluations: dict[str, list[dict[str, Any]]] = {}
    for line in sorted(
        (line for line in lines if line["kind"] == "evaluation"), key=lambda line: line["step"]
    ):
        evaluations.setdefault(line["name"], []).append(line)
    folder = file.resolve().parent
    return RecordedRun(
        folder.name,
        file,
        [line for line in lines if line["kind"] == "train"],
        evaluations,
        _costs(folder),
        _settings(folder),
    )


def _check(line: dict[str, Any], place: str) -> None:
    kind, exits = line.get("kind"), line.get("exits")
    right = (
        kind in ("train", "evaluation")
        and isinstance(line.get("step"), int)
        and isinstance(exits, dict)
    )
    right = right and all(
        DEPTH.fullmatch(depth) and _is_report(numbers) for depth, numbers in exits.items()
    )
    if not right or (kind == "evaluation" and not isinstance(line.get("name"), str)):
        raise DataError(f"{place}: not a report of a run. {GIVE}")


def _is_report(numbers: Any) -> bool:
    return (
        isinstance(numbers, dict)
        and "loss" in numbers
        and all(isinstance(one, int | float | None) for one in numbers.values())
    )


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a file; an empty one if the file is missing or damaged."""
    try:
        return read_json_object(path)
    except DataError:
        return {}


def _costs(folder: Path) -> dict[int, dict[str, float]]:
    exits = _json(folder / "evaluation.json").get("exits")
    if not isinstance(exits, dict):
        return {}
    return {
        int(depth): costs
        for depth, costs in exits.items()
        if DEPTH.fullmatch(depth)
        and isinstance(costs, dict)
        and {"parameters", "flops_per_token"} <= set(costs)
    }


def _settings(folder: Path) -> dict[str, Any]:
    for directory in sorted(folder.glob("iter_*"), reverse=True):
        for name in ("manifest.json", "run.json"):
            settings = _json(directory / name).get("settings")
            if isinstance(settings, dict):
                return settings
    return {}
