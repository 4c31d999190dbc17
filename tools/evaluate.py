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
from evaluation.picture import draw
from evaluation.table import write_tables

from megatron_sorted.checkpoint.layout import write_text_atomically
from megatron_sorted.errors import DataError
from megatron_sorted.evaluation.evaluate import Measures, evaluate, results_of


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
                "shots": values.shots,
                "question_template": values.question_template, "max_new_tokens": values.max_new_tokens, "seed": values.seed,
                "separator": values.separator, "texts": [str(path) for path in values.text],
                "questions": [str(path) for path in values.questions], "train_heads": values.train_heads and str(values.train_heads),
                "task_shots": values.task_shots, "task_limit": values.task_limit}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, writes JSON, answers and picture."""
    values = read_arguments(arguments, __doc__)
    subjects = name_subjects(values)
    measures = read_measures(values, subjects)
    try:
        values.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--output: {values.output} cannot be written ({error.strerror}). Give another folder.") from error
    found = evaluate(subjects, measures)
    results = describe(values, measures) | results_of(found, measures)
    print("\n" + write_tables(results))
    write_text_atomically(values.output / "evaluation.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    for name, asked in measures.questions.items():
        lines = [json.dumps({"question": question.text, "right": question.right, "prompt": prompt, "answers": {
            one.name: {depth: answered.answers[place] for depth, answered in one.questions[name].items()} for one in found}},
            ensure_ascii=False) for place, (question, prompt) in enumerate(zip(asked.questions, asked.prompts, strict=True))]
        write_text_atomically(values.output / f"answers_{name}.jsonl", "\n".join(lines) + "\n")
    draw(results, values.output / "evaluation.png")
    print(f"\nwritten: {values.output / 'evaluation.json'}, {values.output / 'evaluation.png'}"
          + (f", {values.save_heads}" if values.save_heads else ""))


if __name__ == "__main__":
    # Tasks of lm-evaluation-harness import Hugging Face's package `evaluate`; with this folder on the path they would find this file.
    sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    run_main(main)
