"""The tables of losses by position: a row for each bucket and model, a column for each exit."""

from collections.abc import Callable

from megatron_sorted.evaluation.output.cells import MINUS, align, error_of

LOSS = (
    "loss: nats per counted token; ± one standard error over {units} (ratio estimator); all "
    "buckets see the same windows"
)
POSITIONS = "positions: number of tokens of the window that stand before the predicted one"
ACCURACY = "accuracy: share of counted tokens that are the most likely one"


def write_position_tables(results: dict) -> list[str]:
    """Return a table of losses and one of accuracies for every text."""
    settings, tables = results["settings"]["positions"], []
    units = "windows" if settings["joined"] else "documents"
    source = "all documents, joined" if settings["joined"] else "each document"
    for name, measured in results["positions"].items():
        title = f"by position, whole windows of {settings['length']:,} tokens of {source}"
        models = measured["models"]
        others = _names_of_differences(models)
        losses = _table(
            f"{name}: loss {title}",
            settings["buckets"],
            models,
            {"": _loss} | {f" - {other}": _difference(other) for other in others},
            [LOSS.format(units=units), *[MINUS] * bool(others), POSITIONS],
        )
        accuracies = _table(
            f"{name}: accuracy {title}",
            settings["buckets"],
            models,
            {"": lambda numbers: f"{100 * numbers['accuracy']:.1f}%"},
            [ACCURACY, POSITIONS],
        )
        tables += [losses, accuracies]
    return tables


def _table(
    title: str,
    buckets: list[tuple[int, int]],
    models: dict,
    cells: dict[str, Callable[[dict], str]],
    notes: list[str],
) -> str:
    """Return a table with a row for every bucket, model and entry of ``cells``.

    Entries are {what follows the model's name: function from numbers to a cell}; a row without any
    number is left out.
    """
    depths = sorted(
        {depth for model in models.values() for one in model["buckets"] for depth in one}
    )
    rows, breaks = [["positions", "model", "tokens", *(f"depth {depth}" for depth in depths)]], []
    for number, (first, last) in enumerate(buckets):
        breaks.append(len(rows))
        for name, model in models.items():
            exits = model["buckets"][number]
            for ending, cell in cells.items():
                shown = [cell(exits[depth]) if depth in exits else "" for depth in depths]
                if any(shown):
                    span = f"{first:,}" if first == last else f"{first:,}-{last:,}"
                    tokens = f"{next(iter(exits.values()))['tokens']:,}"
                    rows.append([span, f"{name}{ending}", tokens, *shown])
    return align(title, rows, breaks if len(rows) > len(buckets) + 1 else breaks[:1], notes)


def _loss(numbers: dict) -> str:
    error = error_of(numbers["loss_standard_error"], lambda value: f"{value:.4f}")
    return f"{numbers['loss']:.4f}{error}"


def _difference(other: str) -> Callable[[dict], str]:
    def cell(numbers: dict) -> str:
        difference = numbers.get("loss_minus", {}).get(other)
        if difference is None:
            return ""
        error = error_of(difference["standard_error"], lambda value: f"{value:.4f}")
        return f"{difference['value']:+.4f}{error}"

    return cell


def _names_of_differences(models: dict) -> list[str]:
    """Return the names of the baselines with which models are compared."""
    names = {
        other: None
        for model in models.values()
        for exits in model["buckets"]
        for numbers in exits.values()
        for other in numbers.get("loss_minus", {})
    }
    return list(names)
