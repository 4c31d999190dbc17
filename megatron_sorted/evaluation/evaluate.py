"""Everything that is measured of several models, one after the other, as one object that can be written as JSON."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from megatron_sorted.errors import SettingsError
from megatron_sorted.evaluation.closed_book import Answered, answer_questions, encode_prompts
from megatron_sorted.evaluation.costs import count_parameters, forward_flops_per_token
from megatron_sorted.evaluation.documents import Document, encode_documents
from megatron_sorted.evaluation.harness import Harness
from megatron_sorted.evaluation.held_out import HeldOut, measure_held_out
from megatron_sorted.evaluation.nested_model import NestedModel, load_nested_model
from megatron_sorted.evaluation.questions import Question
from megatron_sorted.evaluation.save_heads import save_with_heads
from megatron_sorted.evaluation.train_heads import HeadTraining, TrainedHeads, train_heads
from megatron_sorted.exported.tokenizer import open_tokenizer

SCORES = ("exact_match", "f1", "exact_match_with_case")


@dataclass(frozen=True)
class Subject:
    """A model to evaluate; ``is_baseline``: others are compared with it; ``with_heads``: also with heads trained on frozen layers."""

    name: str
    directory: Path
    is_baseline: bool = False
    with_heads: bool = False


@dataclass(frozen=True)
class QuestionSet:
    """Questions with their prompts as text."""

    questions: list[Question]
    prompts: list[str]


@dataclass(frozen=True)
class Measures:
    """What is measured, and how.

    Attributes:
        texts, questions: By name, in the order of the tables.
        harness: Tasks of lm-evaluation-harness, or none.
        head_documents: What heads are trained on; needed where a subject asks for it.
    """

    texts: dict[str, list[Document]]
    questions: dict[str, QuestionSet]
    seq_length: int
    stride: int
    depths: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    tokenizer: Path | None = None
    append_eos: bool = False
    batch_tokens: int = 8192
    batch_size: int = 16
    max_new_tokens: int = 32
    harness: Harness | None = None
    task_shots: int | None = None
    task_limit: int | None = None
    head_documents: list[Document] | None = None
    head_training: HeadTraining = field(default_factory=HeadTraining)
    save_heads: Path | None = None
    overwrite: bool = False
    bars: bool = True


@dataclass
class Found:
    """What was measured of one model, still by document and by question, so that models can be compared pairwise."""

    name: str
    is_baseline: bool
    facts: dict
    texts: dict[str, dict[int, HeldOut]] = field(default_factory=dict)
    unknown_tokens: dict[str, int] = field(default_factory=dict)
    questions: dict[str, dict[int, Answered]] = field(default_factory=dict)
    cut_prompts: dict[str, int] = field(default_factory=dict)
    tasks: dict[int, dict[str, dict]] = field(default_factory=dict)


Keep = Callable[[list[Found]], None]


def evaluate(subjects: Sequence[Subject], measures: Measures, keep: Keep = lambda found: None) -> list[Found]:
    """Return what was measured of every model, in order; one model is in memory at a time.

    Args:
        subjects: The models.
        measures: What is measured.
        keep: Called with all that was found so far after every text, set of questions, and depth of the tasks.

    Raises:
        SortedError: as the parts do; what was measured before was kept.
    """
    found: list[Found] = []
    for subject in subjects:
        _evaluate(subject, measures, found, keep)
    return found


def _evaluate(subject: Subject, measures: Measures, found: list[Found], keep: Keep) -> None:
    model = load_nested_model(subject.directory, measures.depths, measures.dtype, subject.name)
    tokenizer = open_tokenizer(subject.directory, measures.tokenizer)
    largest, vocab_size = max(tokenizer.get_vocab().values(), default=0), model.model.config.vocab_size
    if largest >= vocab_size:
        raise SettingsError(f"{subject.name}: the tokenizer has ids up to {largest}, the model a vocabulary of {vocab_size}. "
                            "Give the model's own with --tokenizer.")
    found.append(Found(model.name, subject.is_baseline, _facts(model, subject, tokenizer, measures, None)))
    _measure(model, tokenizer, measures, found[-1], lambda: keep(found))
    if subject.with_heads:
        documents = encode_documents(measures.head_documents or [], tokenizer, measures.append_eos)
        trained = train_heads(model.without_parts(), documents, measures.seq_length, measures.head_training,
                              f"{subject.name}: training heads" if measures.bars else None)
        if measures.save_heads is not None:
            save_with_heads(trained.model, subject.directory, measures.save_heads, measures.overwrite)
        found.append(Found(trained.model.name, True, _facts(trained.model, subject, tokenizer, measures, trained)))
        _measure(trained.model, tokenizer, measures, found[-1], lambda: keep(found))


def _measure(model: NestedModel, tokenizer: PreTrainedTokenizerBase, measures: Measures, found: Found,
             keep: Callable[[], None]) -> None:
    """Fill in what is measured of a model, part by part, and call ``keep`` after each."""

    def title(what: str) -> str | None:
        return f"{model.name}: {what}" if measures.bars else None

    for name, documents in measures.texts.items():
        encoded = encode_documents(documents, tokenizer, measures.append_eos)
        found.texts[name] = measure_held_out(model, encoded, measures.seq_length, measures.stride, measures.batch_tokens, title(name))
        found.unknown_tokens[name] = sum(token == tokenizer.unk_token_id for document in encoded for token in document.ids[1:])
        keep()
    for name, asked in measures.questions.items():
        prompts, found.cut_prompts[name] = encode_prompts(asked.prompts, tokenizer, model.max_positions - measures.max_new_tokens)
        found.questions[name] = {
            depth: answer_questions(model, depth, asked.questions, prompts, tokenizer, measures.max_new_tokens, measures.batch_size,
                                    title(f"{name}, depth {depth}")) for depth in model.depths}
        keep()
    if measures.harness is not None:
        for depth in model.depths:
            if measures.bars:
                print(f"{model.name}: {', '.join(measures.harness.tasks)}, depth {depth}", flush=True)
            found.tasks[depth] = measures.harness.run(model.sub_model(depth), tokenizer, measures.batch_size, measures.task_shots,
                                                      measures.task_limit)
            keep()


def _facts(model: NestedModel, subject: Subject, tokenizer: PreTrainedTokenizerBase, measures: Measures,
           trained: TrainedHeads | None) -> dict:
    exits = {}
    for depth in model.depths:
        sub_model = model.sub_model(depth)
        exits[depth] = {"parameters": count_parameters(sub_model),
                        "flops_per_token": forward_flops_per_token(sub_model, measures.seq_length)}
    facts = {"directory": str(subject.directory), "is_baseline": subject.is_baseline or trained is not None,
             "model_type": model.model.config.model_type, "num_layers": model.num_layers, "vocab_size": model.model.config.vocab_size,
             "tokenizer": type(tokenizer).__name__, "exits": exits}
    if trained is not None:
        facts["trained_heads"] = asdict(measures.head_training) | {
            "lr": trained.lr, "num_steps": trained.num_steps, "num_tokens": trained.num_tokens,
            "num_new_parameters": trained.num_new_parameters, "base_sha256_before_and_after": trained.base_sha256, "losses": trained.losses}
    return facts


def results_of(found: Sequence[Found], measures: Measures) -> dict:
    """Return the numbers of all models as plain objects: ``models``, ``texts``, ``questions`` and ``tasks``, each by name.

    What was not measured yet is left out.
    """
    baselines = [one for one in found if one.is_baseline]
    texts = {name: {"documents": len(documents), "bytes": sum(document.num_bytes for document in documents),
                    "models": {one.name: _text_numbers(one, name, sum(d.num_bytes for d in documents), baselines)
                               for one in found if name in one.texts}}
             for name, documents in measures.texts.items()}
    questions = {name: {"questions": len(asked.questions),
                        "models": {one.name: _question_numbers(one, name, baselines) for one in found if name in one.questions}}
                 for name, asked in measures.questions.items()}
    names = {task: None for one in found for tasks in one.tasks.values() for task in tasks}
    tasks = {task: {"models": {one.name: {"exits": {depth: numbers[task] for depth, numbers in one.tasks.items()}}
                               for one in found if one.tasks}}
             for task in names}
    return {"models": {one.name: one.facts for one in found}, "texts": texts, "questions": questions, "tasks": tasks}


def _text_numbers(one: Found, name: str, num_bytes: int, baselines: Sequence[Found]) -> dict:
    exits = {}
    for depth, held in one.texts[name].items():
        exits[depth] = {"loss": held.loss, "loss_standard_error": held.loss_standard_error, "bits_per_byte": held.bits_per_byte(num_bytes),
                        "perplexity": math.exp(min(held.loss, 700.0)), "agreement": held.agreement}
        for other in baselines:
            theirs = other.texts.get(name, {}).get(depth)
            # losses per token can only be compared when the tokens are the same
            if other is not one and theirs is not None and torch.equal(theirs.tokens_d, held.tokens_d):
                difference = HeldOut(held.nats_d - theirs.nats_d, held.agreed_d, held.tokens_d)
                exits[depth].setdefault("loss_minus", {})[other.name] = {"value": difference.loss,
                                                                         "standard_error": difference.loss_standard_error}
    last = one.texts[name][max(one.texts[name])]
    return {"tokens": int(last.tokens_d.sum()), "unknown_tokens": one.unknown_tokens[name], "exits": exits}


def _question_numbers(one: Found, name: str, baselines: Sequence[Found]) -> dict:
    exits = {}
    for depth, answered in one.questions[name].items():
        exits[depth] = {score: answered.mean(score) for score in SCORES}
        exits[depth] |= {f"{score}_standard_error": answered.standard_error(score) for score in SCORES}
        for other in baselines:
            if other is not one and (theirs := other.questions.get(name, {}).get(depth)) is not None:
                pairs = zip(answered.scores["exact_match"], theirs.scores["exact_match"], strict=True)
                difference = Answered([], {"exact_match": [mine - their for mine, their in pairs]})
                exits[depth].setdefault("exact_match_minus", {})[other.name] = {"value": difference.mean("exact_match"),
                                                                                "standard_error": difference.standard_error("exact_match")}
    return {"cut_prompts": one.cut_prompts[name], "exits": exits}
