"""The measurements of several models as plain objects, compared with the baselines among them."""

import math
from collections.abc import Sequence

import torch

from megatron_sorted.evaluation.closed_book import Answered
from megatron_sorted.evaluation.documents import Document
from megatron_sorted.evaluation.evaluate import Measures, ModelMeasurements
from megatron_sorted.evaluation.held_out import HeldOut

SCORES = ("exact_match", "f1", "exact_match_with_case")


def results_of(measured: Sequence[ModelMeasurements], measures: Measures) -> dict:
    """Return the numbers of all models, without what was not measured yet.

    Returns:
        ``models``, ``texts``, ``positions``, ``data``, ``questions`` and ``tasks``, each by name.
    """
    baselines = [one for one in measured if one.is_baseline]
    texts = {
        name: {
            "documents": len(documents),
            "bytes": sum(document.num_bytes for document in documents),
            "models": {
                one.name: _text_numbers(one, name, documents, baselines)
                for one in measured
                if name in one.texts
            },
        }
        for name, documents in measures.texts.items()
        if measures.positions is None
    }
    positions = {
        name: {
            "models": {
                one.name: _position_numbers(one, name, baselines)
                for one in measured
                if name in one.by_position
            }
        }
        for name in (measures.texts if measures.positions is not None else ())
    }
    data = {
        name: {
            "models": {
                one.name: _data_numbers(one, name, baselines)
                for one in measured
                if name in one.prepared
            }
        }
        for name in measured[0].prepared
    }
    questions = {
        name: {
            "questions": len(questions.questions),
            "models": {
                one.name: _question_numbers(one, name, baselines)
                for one in measured
                if name in one.questions
            },
        }
        for name, questions in measures.questions.items()
    }
    names = {task: None for one in measured for tasks in one.tasks.values() for task in tasks}
    tasks = {
        task: {
            "models": {
                one.name: {"exits": {depth: numbers[task] for depth, numbers in one.tasks.items()}}
                for one in measured
                if one.tasks
            }
        }
        for task in names
    }
    return {
        "models": {one.name: one.facts for one in measured},
        "texts": texts,
        "positions": positions,
        "data": data,
        "questions": questions,
        "tasks": tasks,
    }


def _text_numbers(
    one: ModelMeasurements,
    name: str,
    documents: Sequence[Document],
    baselines: Sequence[ModelMeasurements],
) -> dict:
    exits = _losses(
        one.texts[name],
        {other.name: other.texts.get(name, {}) for other in baselines if other is not one},
    )
    num_bytes = sum(document.num_bytes for document in documents)
    for depth, held in one.texts[name].items():
        exits[depth]["bits_per_byte"] = held.bits_per_byte(num_bytes)
    last = one.texts[name][max(one.texts[name])]
    return {
        "tokens": int(last.tokens_d.sum()),
        "unknown_tokens": one.unknown_tokens[name],
        "exits": exits,
    }


def _position_numbers(
    one: ModelMeasurements, name: str, baselines: Sequence[ModelMeasurements]
) -> dict:
    """Return the losses of every exit for each bucket; {} for one without counted tokens."""
    others = {other.name: other.by_position.get(name) for other in baselines if other is not one}
    buckets = []
    for number, by_depth in enumerate(one.by_position[name]):
        theirs = {other: measured[number] for other, measured in others.items() if measured}
        exits = _losses(by_depth, theirs)
        for depth, held in by_depth.items():
            exits[depth] |= {"accuracy": held.accuracy, "tokens": int(held.tokens_d.sum())}
        buckets.append(exits)
    return {"buckets": buckets}


def _data_numbers(
    one: ModelMeasurements, name: str, baselines: Sequence[ModelMeasurements]
) -> dict:
    exits = _losses(
        one.prepared[name],
        {other.name: other.prepared.get(name, {}) for other in baselines if other is not one},
    )
    for depth, held in one.prepared[name].items():
        exits[depth]["exact_match"] = held.exact_match
    last = one.prepared[name][max(one.prepared[name])]
    return {"tokens": int(last.tokens_d.sum()), "units": len(last.tokens_d), "exits": exits}


def _losses(by_depth: dict[int, HeldOut], others: dict[str, dict[int, HeldOut]]) -> dict[int, dict]:
    """Return the losses of every exit, and their differences to the same exits of other models."""
    exits = {}
    for depth, held in by_depth.items():
        exits[depth] = {
            "loss": held.loss,
            "loss_standard_error": held.loss_standard_error,
            "perplexity": math.exp(min(held.loss, 700.0)),
            "agreement": held.agreement,
        }
        for name, other in others.items():
            theirs = other.get(depth)
            # losses per token can only be compared if the tokens are the same
            if theirs is not None and torch.equal(theirs.tokens_d, held.tokens_d):
                difference = HeldOut(held.nats_d - theirs.nats_d, held.agreed_d, held.tokens_d)
                exits[depth].setdefault("loss_minus", {})[name] = {
                    "value": difference.loss,
                    "standard_error": difference.loss_standard_error,
                }
    return exits


def _question_numbers(
    one: ModelMeasurements, name: str, baselines: Sequence[ModelMeasurements]
) -> dict:
    exits = {}
    for depth, answered in one.questions[name].items():
        exits[depth] = {score: answered.mean(score) for score in SCORES}
        exits[depth] |= {
            f"{score}_standard_error": answered.standard_error(score) for score in SCORES
        }
        for other in baselines:
            theirs = other.questions.get(name, {}).get(depth)
            if other is one or theirs is None:
                continue
            pairs = zip(answered.scores["exact_match"], theirs.scores["exact_match"], strict=True)
            difference = Answered([], {"exact_match": [mine - their for mine, their in pairs]})
            exits[depth].setdefault("exact_match_minus", {})[other.name] = {
                "value": difference.mean("exact_match"),
                "standard_error": difference.standard_error("exact_match"),
            }
    return {"cut_prompts": one.cut_prompts[name], "exits": exits}
