"""``megatron-sorted evaluate``: every exit of trained models, measured.

Results are saved as they come, so that an error in the last task loses nothing.
"""

from collections.abc import Sequence

from megatron_sorted.commands.options.evaluation import KEPT, plain, read_arguments
from megatron_sorted.errors import DataError, SortedError


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the models, print the tables, write JSON, answers and picture."""
    values = read_arguments(arguments)
    from megatron_sorted.commands.options.measures import name_subjects, read_measures
    from megatron_sorted.evaluation.evaluate import evaluate
    from megatron_sorted.evaluation.output.picture import MAX_MODELS, draw
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
    written = [values.output / "evaluation.json"]
    picture = values.output / "evaluation.png"
    if len(measured) <= MAX_MODELS:
        draw(results, picture)
        written.append(picture)
    else:
        picture.unlink(missing_ok=True)  # one of an earlier evaluation would show other numbers
        print(
            f"\nno picture: {len(measured)} models are more than the {MAX_MODELS} that one can "
            "distinguish; the tables list them all"
        )
    if values.save_heads:
        written.append(values.save_heads)
    print(f"\nwritten: {', '.join(map(str, written))}")
