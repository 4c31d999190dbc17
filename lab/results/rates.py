"""The learning rate of each method, chosen on samples that are kept for choosing.

It is the one with the least loss over the depths that the method trains.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from lab.results.recipe import HEADS, Recipe, sweep_folder
from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import read_json_object


def choose_rate(losses: dict[str, dict[int, float]], depths: Sequence[int]) -> str:
    """Return the rate with the least mean loss over ``depths``; of equal ones the first.

    >>> choose_rate({"1e-3": {2: 3.0, 4: 2.0}, "1e-2": {2: 2.0, 4: 2.5}}, depths=[2, 4])
    '1e-2'
    """
    return min(losses, key=lambda rate: fmean(losses[rate][depth] for depth in depths))


def trainer_losses(path: Path, name: str | None = None) -> dict[int, float]:
    """Return the loss at each exit of a set in the trainer's evaluation.json, by default the first.

    Raises:
        DataError: It is no such file, or lacks the set.
    """
    return _losses(
        path,
        "an evaluation of the trainer"
        if name is None
        else f"an evaluation of {name!r} by the trainer",
        lambda record: record["sets"][next(iter(record["sets"])) if name is None else name],
    )


def head_losses(path: Path) -> dict[int, float]:
    """Return the loss at each depth with trained heads, from megatron-sorted evaluate's record.

    Raises:
        DataError: It is no such file.
    """
    return _losses(
        path,
        "an evaluation with trained heads",
        lambda record: next(iter(record["texts"].values()))["models"][HEADS]["exits"],
    )


def read_json(path: Path) -> dict:
    """Return the object in a JSON file of a step.

    Raises:
        DataError: It cannot be read.
    """
    return read_json_object(path, "Start again with --fresh.")


def _losses(path: Path, expected: str, exits_of: Callable[[dict], dict]) -> dict[int, float]:
    record = read_json(path)
    try:
        return {int(depth): float(exit_["loss"]) for depth, exit_ in exits_of(record).items()}
    except (KeyError, StopIteration, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not {expected} ({error}). Start again with --fresh.") from error


def trained_depths(recipe: Recipe, method: str) -> tuple[int, ...]:
    """Return the depths whose loss a method trains; its rate is chosen by these."""
    last = recipe.measured[-1]
    return {
        "ordinary": (last,),
        "nested": (*recipe.exit_depths, last),
        "heads": recipe.measured[:-1],
    }[method]


def sweep_losses(recipe: Recipe, method: str) -> dict[str, dict[int, float]]:
    """Return {rate: {depth: loss}} of the runs that tried rates; empty if there is one rate."""
    rates = recipe.rates[method]
    read = head_losses if method == "heads" else trainer_losses
    return (
        {}
        if len(rates) == 1
        else {rate: read(sweep_folder(recipe, method, rate) / "evaluation.json") for rate in rates}
    )


def chosen_rate(recipe: Recipe, method: str) -> str:
    """Return the rate of the method ``ordinary``, ``nested`` or ``heads``."""
    losses = sweep_losses(recipe, method)
    return (
        choose_rate(losses, trained_depths(recipe, method)) if losses else recipe.rates[method][0]
    )
