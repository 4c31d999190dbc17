"""All measurements of several models, one model after the other."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from megatron_sorted.evaluation.by_position import measure_by_position
from megatron_sorted.evaluation.closed_book import (
    Answered,
    Answering,
    answer_questions,
    encode_conversations,
    encode_prompts,
)
from megatron_sorted.evaluation.decoded import decoding_network
from megatron_sorted.evaluation.documents import Document, encode_documents
from megatron_sorted.evaluation.harness import Harness
from megatron_sorted.evaluation.heads import (
    HeadTraining,
    TrainedHeads,
    save_with_heads,
    train_heads,
)
from megatron_sorted.evaluation.held_out import HeldOut, measure_held_out
from megatron_sorted.evaluation.nested_model import (
    NestedModel,
    count_parameters,
    forward_flops_per_token,
    load_nested_model,
)
from megatron_sorted.evaluation.positions import Positions
from megatron_sorted.evaluation.prepared import PreparedData, measure_prepared, open_prepared
from megatron_sorted.evaluation.questions import Question
from megatron_sorted.exported.generation_defaults import generation_defaults_of
from megatron_sorted.exported.tokenizer import open_tokenizer
from megatron_sorted.reading.shown import printable
from megatron_sorted.text.prompt_form import NO_FORM, PromptForm
from megatron_sorted.text.tokenizer.contract import Tokenizer
from megatron_sorted.text.tokenizer.fit import check_ids, surplus_line

UNFORMED = (
    f"note: it {NO_FORM}; instructions are read as plain text, prompts and answers encoded "
    "separately, and questions are asked in --question-template"
)


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    Attributes:
        name: Name in tables and pictures.
        directory: Directory of the model.
        is_baseline: Whether other models are compared with it.
        with_heads: Whether to evaluate it also with heads trained on its frozen layers.
    """

    name: str
    directory: Path
    is_baseline: bool = False
    with_heads: bool = False


@dataclass(frozen=True)
class QuestionSet:
    """Questions with their prompts.

    Attributes:
        questions: The questions.
        prompts: Prompts as texts, for models that were trained in no form of conversation.
        conversations: Prompts as turns, for models that were trained in one; empty to use the texts
            for all models.
    """

    questions: list[Question]
    prompts: list[str]
    conversations: list[list[dict[str, str]]] = field(default_factory=list)


@dataclass(frozen=True)
class Measures:
    """What is measured, and how.

    Attributes:
        texts, questions: Texts and questions by name, in the order of the tables.
        seq_length, stride: Length of windows of long texts, and the distance of their starts.
        prepared: Prepared data, read as a run's evaluation reads them; None without any.
        positions: Windows and buckets to measure texts by position; None to measure whole texts.
        depths: Exits to measure; None for those that the model names.
        dtype: Data type of the weights.
        tokenizer: Tokenizer of models without one.
        prompt_template: Form of conversations instead of the one that a model was trained in.
        append_eos: Whether counted texts end with eos.
        batch_tokens: Maximum number of tokens of a forward pass.
        batch_size: Number of questions in a batch.
        max_new_tokens: Maximum number of tokens of an answer.
        native: Whether the compiled library generates answers; see `decoded.decoding_network`.
        harness: Tasks of lm-evaluation-harness; None without any.
        task_shots, task_limit: Numbers of worked examples and of samples of these tasks.
        head_documents: Documents to train heads on; needed if a subject has ``with_heads``.
        head_training: How heads are trained.
        save_heads: Directory for a model with trained heads; None to not save it.
        overwrite: Whether to replace that directory.
        bars: Whether to show progress.
    """

    texts: dict[str, list[Document]]
    questions: dict[str, QuestionSet]
    seq_length: int
    stride: int
    prepared: PreparedData | None = None
    positions: Positions | None = None
    depths: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    tokenizer: Path | None = None
    prompt_template: str | None = None
    append_eos: bool = False
    batch_tokens: int = 8192
    batch_size: int = 16
    max_new_tokens: int = 32
    native: str = "auto"
    harness: Harness | None = None
    task_shots: int | None = None
    task_limit: int | None = None
    head_documents: list[Document] | None = None
    head_training: HeadTraining = field(default_factory=HeadTraining)
    save_heads: Path | None = None
    overwrite: bool = False
    bars: bool = True

    @property
    def has_instructions(self) -> bool:
        """Return whether there are instructions, conversations or questions."""
        return bool(self.questions) or any(
            document.kind != "text" for texts in self.texts.values() for document in texts
        )


@dataclass
class ModelMeasurements:
    """The measurements of one model, by document and question, so that models can be paired.

    Attributes:
        name: Name of the model.
        is_baseline: Whether other models are compared with it.
        facts: Facts about the model for the written results.
        texts, prepared: {name: {depth: losses}}.
        by_position: {name of a text: [{depth: losses} of each bucket]}.
        unknown_tokens: {name of a text: number of unknown tokens}.
        questions: {name: {depth: answers}}.
        cut_prompts: {name of questions: number of truncated prompts}.
        tasks: {depth: {task: metrics}}.
    """

    name: str
    is_baseline: bool
    facts: dict
    texts: dict[str, dict[int, HeldOut]] = field(default_factory=dict)
    by_position: dict[str, list[dict[int, HeldOut]]] = field(default_factory=dict)
    unknown_tokens: dict[str, int] = field(default_factory=dict)
    prepared: dict[str, dict[int, HeldOut]] = field(default_factory=dict)
    questions: dict[str, dict[int, Answered]] = field(default_factory=dict)
    cut_prompts: dict[str, int] = field(default_factory=dict)
    tasks: dict[int, dict[str, dict]] = field(default_factory=dict)


Keep = Callable[[list[ModelMeasurements]], None]


def evaluate(
    subjects: Sequence[Subject], measures: Measures, keep: Keep = lambda measured: None
) -> list[ModelMeasurements]:
    """Measure every model, in order; only one model is in memory at a time.

    Args:
        subjects: The models.
        measures: What is measured.
        keep: Function that is called with all measurements so far after every text, the prepared
            data, every set of questions, and every depth of the tasks.

    Raises:
        SortedError: A measurement failed; the earlier ones were kept.
    """
    measured: list[ModelMeasurements] = []
    for subject in subjects:
        _evaluate(subject, measures, measured, keep)
    return measured


def _evaluate(
    subject: Subject, measures: Measures, measured: list[ModelMeasurements], keep: Keep
) -> None:
    """Append the measurements of a model, and of the model with trained heads."""
    model = load_nested_model(subject.directory, measures.depths, measures.dtype, subject.name)
    tokenizer = open_tokenizer(subject.directory, measures.tokenizer)
    surplus = surplus_line(tokenizer, model.model.config.vocab_size, subject.name)
    for line in (*tokenizer.notes, *([surplus] if surplus else [])):
        print(f"note: {printable(line)}", file=sys.stderr)
    form = generation_defaults_of(subject.directory, tokenizer, measures.prompt_template)
    used = form.form_in_use(measures.prompt_template is not None)
    if measures.bars and measures.has_instructions:
        print(f"{subject.name}: {form.line if used else UNFORMED}", flush=True)
    facts = _facts(model, subject, tokenizer, measures, None)
    measured.append(ModelMeasurements(model.name, subject.is_baseline, facts))
    _measure(model, tokenizer, measures, used, measured[-1], lambda: keep(measured))
    if not subject.with_heads:
        return
    documents = measures.head_documents or []
    trained = train_heads(
        model.without_parts(),
        encode_documents(documents, tokenizer, measures.append_eos, used),
        measures.seq_length,
        measures.head_training,
        f"{subject.name}: training heads" if measures.bars else None,
    )
    model = trained.model
    if measures.save_heads is not None:
        save_with_heads(model, subject.directory, measures.save_heads, measures.overwrite)
    facts = _facts(model, subject, tokenizer, measures, trained)
    measured.append(ModelMeasurements(model.name, True, facts))
    _measure(model, tokenizer, measures, used, measured[-1], lambda: keep(measured))


def _measure(
    model: NestedModel,
    tokenizer: Tokenizer,
    measures: Measures,
    form: PromptForm | None,
    measured: ModelMeasurements,
    keep: Callable[[], None],
) -> None:
    """Fill in the measurements of a model, and call ``keep`` after each."""
    vocab_size = model.model.config.vocab_size

    def title(what: str) -> str | None:
        return f"{model.name}: {what}" if measures.bars else None

    for name, documents in measures.texts.items():
        encoded = encode_documents(documents, tokenizer, measures.append_eos, form)
        check_ids((document.ids for document in encoded), tokenizer, vocab_size, name)
        if measures.positions is not None:
            measured.by_position[name] = measure_by_position(
                model, encoded, measures.positions, measures.batch_tokens, title(name)
            )
            keep()
            continue
        measured.texts[name] = measure_held_out(
            model, encoded, measures.seq_length, measures.stride, measures.batch_tokens, title(name)
        )
        measured.unknown_tokens[name] = sum(
            token == tokenizer.unk_id for document in encoded for token in document.ids[1:]
        )
        keep()
    if measures.prepared is not None:
        sets = open_prepared(measures.prepared, vocab_size, tokenizer)
        measured.prepared = {
            name: measure_prepared(
                model, samples, measures.prepared.limit, measures.batch_tokens, title(name)
            )
            for name, samples in sets.items()
        }
        keep()
    network = decoding_network(model, measures.native) if measures.questions else None
    for name, questions in measures.questions.items():
        max_tokens, ends = model.max_positions - measures.max_new_tokens, ()
        if form is not None and form.is_conversation and questions.conversations:
            prompts, num_cut = encode_conversations(
                questions.conversations, form, tokenizer, max_tokens
            )
            ends = form.end_ids
        else:
            prompts, num_cut = encode_prompts(questions.prompts, tokenizer, max_tokens)
        measured.cut_prompts[name] = num_cut
        check_ids(prompts, tokenizer, vocab_size, name)
        if num_cut:
            print(cut_line(f"{model.name}, {name}", num_cut, len(prompts), max_tokens), flush=True)
        how = Answering(tokenizer, measures.max_new_tokens, measures.batch_size, ends)
        measured.questions[name] = {
            depth: answer_questions(
                model,
                depth,
                questions.questions,
                prompts,
                how,
                title(f"{name}, depth {depth}"),
                network,
            )
            for depth in model.depths
        }
        keep()
    for depth in model.depths if measures.harness is not None else ():
        if measures.bars:
            print(f"{title(', '.join(measures.harness.tasks))}, depth {depth}", flush=True)
        measured.tasks[depth] = measures.harness.run(
            model.sub_model(depth),
            tokenizer,
            measures.batch_size,
            measures.task_shots,
            measures.task_limit,
        )
        keep()


def cut_line(name: str, num_cut: int, num_prompts: int, max_tokens: int) -> str:
    """Return the note about truncated prompts, which is printed before the numbers they affect."""
    return (
        f"{name}: {num_cut:,} of {num_prompts:,} prompts are longer than the {max_tokens:,} tokens "
        "that the context leaves for them and lost their beginning; with fewer --shots or "
        "--max-new-tokens they lose less"
    )


def _facts(
    model: NestedModel,
    subject: Subject,
    tokenizer: Tokenizer,
    measures: Measures,
    trained: TrainedHeads | None,
) -> dict:
    """Return the facts about a model for the written results."""
    exits = {}
    for depth in model.depths:
        sub_model = model.sub_model(depth)
        exits[depth] = {
            "parameters": count_parameters(sub_model),
            "flops_per_token": forward_flops_per_token(sub_model, measures.seq_length),
        }
    facts = {
        "directory": str(subject.directory),
        "is_baseline": subject.is_baseline or trained is not None,
        "model_type": model.model.config.model_type,
        "num_layers": model.num_layers,
        "vocab_size": model.model.config.vocab_size,
        "max_positions": model.max_positions,
        "tokenizer": type(tokenizer).__name__,
        "exits": exits,
    }
    if trained is not None:
        facts["trained_heads"] = asdict(measures.head_training) | {
            "lr": trained.lr,
            "num_steps": trained.num_steps,
            "num_tokens": trained.num_tokens,
            "num_new_parameters": trained.num_new_parameters,
            "base_sha256_before_and_after": trained.base_sha256,
            "losses": trained.losses,
        }
    return facts
