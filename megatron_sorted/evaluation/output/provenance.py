"""The provenance of an evaluation's numbers, and all answers of the models."""

import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch
import transformers

from megatron_sorted.evaluation.evaluate import Measures, ModelMeasurements
from megatron_sorted.settings.derived import document_masks


def describe(measures: Measures, options: Mapping[str, Any]) -> dict:
    """Return versions, command and settings; ``options`` are kept as they are."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if measures.harness is not None:
        versions["lm_eval"] = measures.harness.version
    overlap = "not overlapping"
    if measures.stride != measures.seq_length:
        overlap = f"starting {measures.stride} apart"
    windows = f"longer documents in windows of {measures.seq_length} tokens, {overlap}"
    if measures.positions is not None:
        windows = f"whole windows of {measures.positions.length} tokens, not overlapping"
    counted = (
        "every token of the text exactly once; bos (or eos, where there is no bos) stands before "
        "each document and is not counted; "
        f"{'eos at the end is counted' if measures.append_eos else 'no eos'}; {windows}; "
        "of instructions the responses only"
    )
    return {
        "format": 1,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions,
        "settings": {
            "seq_length": measures.seq_length,
            "stride": measures.stride,
            "counted": counted,
            "data": _describe_data(measures),
            "positions": _describe_positions(measures),
            **options,
        },
    }


def _describe_data(measures: Measures) -> dict | None:
    """Return the settings of prepared data; None without any."""
    if measures.prepared is None:
        return None
    settings = measures.prepared.settings
    return {
        "prefixes": list(measures.prepared.prefixes),
        "seq_length": settings.seq_length,
        "limit": measures.prepared.limit,
        "split": settings.split if settings.data_path else None,
        **document_masks(settings),
    }


def _describe_positions(measures: Measures) -> dict | None:
    """Return the windows and buckets of losses by position; None without any."""
    if measures.positions is None:
        return None
    return {
        "length": measures.positions.length,
        "joined": measures.positions.joined,
        "buckets": [list(bucket) for bucket in measures.positions.buckets],
    }


def answers_of(measured: Sequence[ModelMeasurements], measures: Measures) -> dict[str, str]:
    """Return {name of questions: all models' answers, as one JSON object per question and line}."""
    files = {}
    for name, questions in measures.questions.items():
        by_model = {one.name: one.questions[name] for one in measured if name in one.questions}
        pairs = zip(questions.questions, questions.prompts, strict=True)
        lines = []
        for number, (question, prompt) in enumerate(pairs):
            answers = {
                model: {depth: answered.answers[number] for depth, answered in by_depth.items()}
                for model, by_depth in by_model.items()
            }
            record = {"question": question.text, "right": question.right, "prompt": prompt}
            lines.append(json.dumps(record | {"answers": answers}, ensure_ascii=False))
        if by_model:
            files[name] = "\n".join(lines) + "\n"
    return files
