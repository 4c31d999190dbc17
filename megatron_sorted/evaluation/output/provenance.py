"""How the numbers of an evaluation came about, and every answer that was given."""

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


def describe(measures: Measures, asked: Mapping[str, Any]) -> dict:
    """Return how the numbers came about; ``asked`` holds those settings of the command line that are kept as they are."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if measures.harness is not None:
        versions["lm_eval"] = measures.harness.version
    counted = "every token of the text exactly once; bos (or eos, where there is no bos) stands before each document and is not counted"
    counted += "; eos at the end is counted" if measures.append_eos else "; no eos"
    overlap = (
        "not overlapping"
        if measures.stride == measures.seq_length
        else f"starting {measures.stride} apart"
    )
    counted += f"; longer documents in windows of {measures.seq_length} tokens, {overlap}; of instructions the responses only"
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
            **asked,
        },
    }


def _describe_data(measures: Measures) -> dict | None:
    """Return how prepared data were read."""
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


def answers_of(found: Sequence[ModelMeasurements], measures: Measures) -> dict[str, str]:
    """Return {set of questions: what every model answered, one JSON object a question} of the sets that were asked."""
    written = {}
    for name, asked in measures.questions.items():
        answered = [one for one in found if name in one.questions]
        lines = [
            json.dumps(
                {
                    "question": question.text,
                    "right": question.right,
                    "prompt": prompt,
                    "answers": {
                        one.name: {
                            depth: answers.answers[place]
                            for depth, answers in one.questions[name].items()
                        }
                        for one in answered
                    },
                },
                ensure_ascii=False,
            )
            for place, (question, prompt) in enumerate(
                zip(asked.questions, asked.prompts, strict=True)
            )
        ]
        if answered:
            written[name] = "\n".join(lines) + "\n"
    return written
