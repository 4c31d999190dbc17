"""Everything that is measured of several models, one after the other, as one object that can be written as JSON."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from megatron_sorted.evaluation.closed_book import (
    Answered,
    Answering,
    answer_questions,
    encode_conversations,
    encode_prompts,
)
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
from megatron_sorted.evaluation.prepared import PreparedData, measure_prepared, open_prepared
from megatron_sorted.evaluation.questions import Question
from megatron_sorted.exported.form import form_of_model
from megatron_sorted.exported.tokenizer import open_tokenizer
from megatron_sorted.reading.shown import printable
from megatron_sorted.text.prompt_form import NO_FORM, PromptForm
from megatron_sorted.text.tokenizer.contract import Tokenizer
from megatron_sorted.text.tokenizer.fit import check_ids, surplus_line

UNFORMED = (
    f"note: it {NO_FORM}; instructions are read as plain text, prompts and answers encoded apart, and questions are asked in "
    "--question-template"
)


@dataclass(frozen=True)
class Subject:
    """A model to evaluate; ``is_baseline``: others are compared with it; ``with_heads``: also with heads trained on frozen layers."""

    name: str
    directory: Path
    is_baseline: bool = False
    with_heads: bool = False


@dataclass(frozen=True)
class QuestionSet:
    """Questions with their prompts.

    Attributes:
        questions: That are asked.
        prompts: As text, for models that were trained in no form of conversation, or where a template of questions was given.
        conversations: As turns, for models that were; empty where only texts are wanted.
    """

    questions: list[Question]
    prompts: list[str]
    conversations: list[list[dict[str, str]]] = field(default_factory=list)


@dataclass(frozen=True)
class Measures:
    """What is measured, and how.

    Attributes:
        texts, questions: By name, in the order of the tables.
        prepared: Prepared data, read as a run's evaluation reads them; or none.
        prompt_template: Form of conversations, instead of the one that a model was trained in.
        harness: Tasks of lm-evaluation-harness, or none.
        head_documents: What heads are trained on; needed where a subject asks for it.
    """

    texts: dict[str, list[Document]]
    questions: dict[str, QuestionSet]
    seq_length: int
    stride: int
    prepared: PreparedData | None = None
    depths: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    tokenizer: Path | None = None
    prompt_template: str | None = None
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

    @property
    def asks(self) -> bool:
        """Return whether anything is read as instructions, conversations or questions."""
        return bool(self.questions) or any(
            document.kind != "text" for texts in self.texts.values() for document in texts
        )


@dataclass
class ModelMeasurements:
    """What was measured of one model, still by document and by question, so that models can be compared pairwise."""

    name: str
    is_baseline: bool
    facts: dict
    texts: dict[str, dict[int, HeldOut]] = field(default_factory=dict)
    unknown_tokens: dict[str, int] = field(default_factory=dict)
    prepared: dict[str, dict[int, HeldOut]] = field(default_factory=dict)
    questions: dict[str, dict[int, Answered]] = field(default_factory=dict)
    cut_prompts: dict[str, int] = field(default_factory=dict)
    tasks: dict[int, dict[str, dict]] = field(default_factory=dict)


Keep = Callable[[list[ModelMeasurements]], None]


def evaluate(
    subjects: Sequence[Subject], measures: Measures, keep: Keep = lambda found: None
) -> list[ModelMeasurements]:
    """Return what was measured of every model, in order; one model is in memory at a time.

    Args:
        subjects: The models.
        measures: What is measured.
        keep: Called with all that was found so far after every text, the prepared data, every set of questions, and
            every depth of the tasks.

    Raises:
        SortedError: as the parts do; what was measured before was kept.
    """
    found: list[ModelMeasurements] = []
    for subject in subjects:
        _evaluate(subject, measures, found, keep)
    return found


def _evaluate(
    subject: Subject, measures: Measures, found: list[ModelMeasurements], keep: Keep
) -> None:
    model = load_nested_model(subject.directory, measures.depths, measures.dtype, subject.name)
    tokenizer = open_tokenizer(subject.directory, measures.tokenizer)
    surplus = surplus_line(tokenizer, model.model.config.vocab_size, subject.name)
    for line in (*tokenizer.notes, *([surplus] if surplus else [])):
        print(f"note: {printable(line)}", file=sys.stderr)
    form = form_of_model(subject.directory, tokenizer, measures.prompt_template)
    asked = form.prompt_form if form.is_stored or measures.prompt_template is not None else None
    if measures.bars and measures.asks:
        print(f"{subject.name}: {form.line if asked else UNFORMED}", flush=True)
    found.append(
        ModelMeasurements(
            model.name, subject.is_baseline, _facts(model, subject, tokenizer, measures, None)
        )
    )
    _measure(model, tokenizer, measures, asked, found[-1], lambda: keep(found))
    if subject.with_heads:
        documents = encode_documents(
            measures.head_documents or [], tokenizer, measures.append_eos, asked
        )
        trained = train_heads(
            model.without_parts(),
            documents,
            measures.seq_length,
            measures.head_training,
            f"{subject.name}: training heads" if measures.bars else None,
        )
        if measures.save_heads is not None:
            save_with_heads(
                trained.model, subject.directory, measures.save_heads, measures.overwrite
            )
        found.append(
            ModelMeasurements(
                trained.model.name,
                True,
                _facts(trained.model, subject, tokenizer, measures, trained),
            )
        )
        _measure(trained.model, tokenizer, measures, asked, found[-1], lambda: keep(found))


def _measure(
    model: NestedModel,
    tokenizer: Tokenizer,
    measures: Measures,
    form: PromptForm | None,
    found: ModelMeasurements,
    keep: Callable[[], None],
) -> None:
    """Fill in what is measured of a model, part by part, and call ``keep`` after each."""

    def title(what: str) -> str | None:
        return f"{model.name}: {what}" if measures.bars else None

    for name, documents in measures.texts.items():
        encoded = encode_documents(documents, tokenizer, measures.append_eos, form)
        check_ids(
            (document.ids for document in encoded), tokenizer, model.model.config.vocab_size, name
        )
        found.texts[name] = measure_held_out(
            model, encoded, measures.seq_length, measures.stride, measures.batch_tokens, title(name)
        )
        found.unknown_tokens[name] = sum(
            token == tokenizer.unk_id for document in encoded for token in document.ids[1:]
        )
        keep()
    if measures.prepared is not None:
        sets = open_prepared(measures.prepared, model.model.config.vocab_size, tokenizer)
        found.prepared = {
            name: measure_prepared(
                model, samples, measures.prepared.limit, measures.batch_tokens, title(name)
            )
            for name, samples in sets.items()
        }
        keep()
    for name, asked in measures.questions.items():
        room, ends = model.max_positions - measures.max_new_tokens, ()
        if form is not None and form.is_conversation and asked.conversations:
            prompts, found.cut_prompts[name] = encode_conversations(
                asked.conversations, form, tokenizer, room
            )
            ends = form.end_ids
        else:
            prompts, found.cut_prompts[name] = encode_prompts(asked.prompts, tokenizer, room)
        check_ids(prompts, tokenizer, model.model.config.vocab_size, name)
        if found.cut_prompts[name]:
            print(
                cut_line(f"{model.name}, {name}", found.cut_prompts[name], len(prompts), room),
                flush=True,
            )
        how = Answering(tokenizer, measures.max_new_tokens, measures.batch_size, ends)
        found.questions[name] = {
            depth: answer_questions(
                model, depth, asked.questions, prompts, how, title(f"{name}, depth {depth}")
            )
            for depth in model.depths
        }
        keep()
    if measures.harness is not None:
        for depth in model.depths:
            if measures.bars:
                print(
                    f"{model.name}: {', '.join(measures.harness.tasks)}, depth {depth}", flush=True
                )
            found.tasks[depth] = measures.harness.run(
                model.sub_model(depth),
                tokenizer,
                measures.batch_size,
                measures.task_shots,
                measures.task_limit,
            )
            keep()


def cut_line(name: str, num_cut: int, num_prompts: int, room: int) -> str:
    """Return the line that says how many prompts lost their beginning; it stands before the numbers that come of it."""
    return (
        f"{name}: {num_cut:,} of {num_prompts:,} prompts are longer than the {room:,} tokens that the context leaves for them and lost "
        "their beginning; fewer --shots or --max-new-tokens cut less"
    )


def _facts(
    model: NestedModel,
    subject: Subject,
    tokenizer: Tokenizer,
    measures: Measures,
    trained: TrainedHeads | None,
) -> dict:
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
