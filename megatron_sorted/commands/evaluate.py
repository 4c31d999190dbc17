"""``megatron-sorted evaluate``: every exit of trained models, measured.

Results are saved as they come, so that an error in the last task loses nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.commands.options.evaluation import KEPT, plain, read_arguments
from megatron_sorted.errors import DataError, SortedError


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the models, print the tables, write JSON, answers and picture."""
    values = read_arguments(arguments)
    from megatron_sorted.commands.options.measures import name_subjects, read_measures
    from megatron_sorted.evaluation.evaluate import evaluate
    from megatron_sorted.evaluation.output.provenance import answers_of, describe
    from megatron_sorted.evaluation.output.record import Record
    from megatron_sorted.evaluation.output.results import results_of
    from megatron_sorted.evaluation.output.table import write_tables

    subjects = name_subjects(values)
    measures = read_measures(values, subjects)
    try:
        values.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"--output: {values.output} cannot be written ({error.strerror}). Give another folder."
        ) from error
    kept = {name: plain(getattr(values, name)) for name in KEPT} | {"texts": plain(values.text)}
    described, record = describe(measures, kept), Record(values.output)
    try:
        measured = evaluate(
            subjects,
            measures,
            lambda so_far: record.keep(
                described | results_of(so_far, measures), answers_of(so_far, measures)
            ),
        )
    except SortedError as error:
        if record.kept is None:
            raise
        raise type(error)(f"{error} What was measured before is in {record.kept}.") from error
    results = described | results_of(measured, measures)
    print("\n" + write_tables(results))
    record.finish(results, answers_of(measured, measures))
    written = [values.output / "evaluation.json", *_draw_pictures(results, values.output)]
    if values.save_heads:
        written.append(values.save_heads)
    print(f"\nwritten: {', '.join(map(str, written))}")


def _draw_pictures(results: dict, folder: Path) -> list[Path]:
    """Write the pictures of what was measured, and return their paths."""
    from megatron_sorted.evaluation.output.picture import MAX_MODELS, draw, rows_of
    from megatron_sorted.evaluation.output.position_picture import draw_positions

    num_models, written = len(results["models"]), []
    for path, draw_one, is_measured in (
        (folder / "evaluation.png", draw, bool(rows_of(results))),
        (folder / "positions.png", draw_positions, bool(results["positions"])),
    ):
        if is_measured and num_models <= MAX_MODELS:
            draw_one(results, path)
            written.append(path)
        else:
            path.unlink(missing_ok=True)  # one of an earlier evaluation would show other numbers
    if num_models > MAX_MODELS:
        print(
            f"\nno picture: {num_models} models are more than the {MAX_MODELS} that one can "
            "distinguish; the tables list them all"
        )
    return written
