"""Measures every exit of finished models: held-out loss, closed-book questions, tasks of lm-evaluation-harness.

    python tools/evaluate.py runs/nested_hf --text stories.txt --separator '<|endoftext|>'
    python tools/evaluate.py nested=runs/a --baseline plain=runs/b --train-heads train.txt --text valid.txt \\
        --questions trivia.jsonl --shots 5 --tasks my_task --tasks-path my_tasks

MODEL is a Hugging Face directory (llama, mistral, qwen2, qwen3), ordinary or nested, or one of checkpoints. Prints tables, writes
evaluation.json and evaluation.png into --output. docs/evaluation.md says how every number is defined.
"""

from megatron_sorted.command import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from evaluation.options import name_subjects, read_arguments, read_measures
from evaluation.picture import MAX_MODELS, draw
from evaluation.record import Record
from evaluation.table import write_tables

from megatron_sorted.errors import DataError, SortedError
from megatron_sorted.evaluation.evaluate import Found, Measures, evaluate
from megatron_sorted.evaluation.results import results_of
from megatron_sorted.settings.derived import document_masks


def describe(values: argparse.Namespace, measures: Measures) -> dict:
    """Returns how the numbers came about."""
    import transformers

    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    if measures.harness is not None:
        versions["lm_eval"] = measures.harness.version
    counted = "every token of the text exactly once; bos (or eos, where there is no bos) stands before each document and is not counted"
    counted += "; eos at the end is counted" if values.append_eos else "; no eos"
    overlap = "not overlapping" if measures.stride == measures.seq_length else f"starting {measures.stride} apart"
    counted += f"; longer documents in windows of {measures.seq_length} tokens, {overlap}; of instructions the responses only"
    return {"format": 1, "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *sys.argv]), "versions": versions, "settings": {
                "dtype": values.dtype, "seq_length": measures.seq_length, "stride": measures.stride, "counted": counted,
                "shots": values.shots, "data": _describe_data(measures),
                "question_template": values.question_template, "max_new_tokens": values.max_new_tokens, "seed": values.seed,
                "separator": values.separator, "texts": [str(path) for path in values.text],
                "questions": [str(path) for path in values.questions], "train_heads": values.train_heads and str(values.train_heads),
                "task_shots": values.task_shots, "task_limit": values.task_limit}}


def _describe_data(measures: Measures) -> dict | None:
    """Return how prepared data were read."""
    if measures.prepared is None:
        return None
    settings = measures.prepared.settings
    return {"prefixes": list(measures.prepared.prefixes), "seq_length": settings.seq_length, "limit": measures.prepared.limit,
            "split": settings.split if settings.data_path else None, **document_masks(settings)}


def answers_of(found: list[Found], measures: Measures) -> dict[str, str]:
    """Return {set of questions: what every model answered, one JSON object a question} of the sets that were asked."""
    written = {}
    for name, asked in measures.questions.items():
        answered = [one for one in found if name in one.questions]
        lines = [json.dumps({"question": question.text, "right": question.right, "prompt": prompt, "answers": {
            one.name: {depth: answers.answers[place] for depth, answers in one.questions[name].items()} for one in answered}},
            ensure_ascii=False) for place, (question, prompt) in enumerate(zip(asked.questions, asked.prompts, strict=True))]
        if answered:
            written[name] = "\n".join(lines) + "\n"
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, writes JSON, answers and picture."""
    values = read_arguments(arguments, __doc__)
    subjects = name_subjects(values)
    measures = read_measures(values, subjects)
    try:
        values.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--output: {values.output} cannot be written ({error.strerror}). Give another folder.") from error
    described, record = describe(values, measures), Record(values.output)
    try:
        found = evaluate(subjects, measures, lambda so_far: record.keep(described | results_of(so_far, measures),
                                                                        answers_of(so_far, measures)))
    except SortedError as error:
        if record.kept is None:
            raise
        raise type(error)(f"{error} What was measured before is in {record.kept}.") from error
    results = described | results_of(found, measures)
    print("\n" + write_tables(results))
    record.finish(results, answers_of(found, measures))
    written = [values.output / "evaluation.json"]
    picture = values.output / "evaluation.png"
    if len(found) <= MAX_MODELS:
        draw(results, picture)
        written.append(picture)
    else:
        picture.unlink(missing_ok=True)  # of an earlier evaluation, which these numbers are not
        print(f"\nno picture: {len(found)} models are more than the {MAX_MODELS} that one can tell apart; the tables have them all")
    print(f"\nwritten: {', '.join(map(str, [*written, *[values.save_heads] * bool(values.save_heads)]))}")


if __name__ == "__main__":
    # Tasks of lm-evaluation-harness import Hugging Face's package `evaluate`; with this folder on the path they would find this file.
    sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    run_main(main)
