"""Which learning rate each method gets: the one with the least loss on the samples kept for choosing, over the depths it trains."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from lab.results.recipe import HEADS, Recipe, sweep_folder
from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import read_json_object


def choose_rate(losses: dict[str, dict[int, float]], depths: Sequence[int]) -> str:
    """Return the rate with the least mean loss over ``depths``; of equal ones the first."""
    return min(losses, key=lambda rate: fmean(losses[rate][depth] for depth in depths))


def trainer_losses(path: Path) -> dict[int, float]:
    """Return the loss at each exit of the first set in an evaluation.json of the trainer.

    Raises:
        DataError: It is no such file.
    """
    found = _read(path)
    try:
        return {
            int(depth): numbers["loss"]
            for depth, numbers in next(iter(found["sets"].values())).items()
        }
    except (KeyError, StopIteration, AttributeError) as error:
        raise DataError(
            f"{path}: not an evaluation of the trainer ({error}). Start again with --fresh."
        ) from error


def head_losses(path: Path) -> dict[int, float]:
    """Return the loss at each depth with trained heads, from an evaluation.json of megatron-sorted evaluate.

    Raises:
        DataError: It is no such file.
    """
    found = _read(path)
    try:
        exits = next(iter(found["texts"].values()))["models"][HEADS]["exits"]
        return {int(depth): numbers["loss"] for depth, numbers in exits.items()}
    except (KeyError, StopIteration, AttributeError) as error:
        raise DataError(
            f"{path}: not an evaluation with trained heads ({error}). Start again with --fresh."
        ) from error


def trained_depths(recipe: Recipe, method: str) -> tuple[int, ...]:
    """Return the depths whose loss a method trains, which are those its rate is chosen by."""
    last = recipe.measured[-1]
    return {
        "ordinary": (last,),
        "nested": (*recipe.exit_depths, last),
        "heads": recipe.measured[:-1],
    }[method]


def sweep_losses(recipe: Recipe, method: str) -> dict[str, dict[int, float]]:
    """Return {rate: {depth: loss}} of the runs that tried rates; empty where there was no choice."""
    rates = recipe.rates[method]
    read = head_losses if method == "heads" else trainer_losses
    return (
        {}
        if len(rates) == 1
        else {rate: read(sweep_folder(recipe, method, rate) / "evaluation.json") for rate in rates}
    )


def chosen_rate(recipe: Recipe, method: str) -> str:
    """Return the rate of ``ordinary``, ``nested`` or ``heads``."""
    losses = sweep_losses(recipe, method)
    return (
        choose_rate(losses, trained_depths(recipe, method)) if losses else recipe.rates[method][0]
    )


def _read(path: Path) -> dict:
    return read_json_object(path, "Start again with --fresh.")
