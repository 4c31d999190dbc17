"""A comparison of decoding strategies: from questions to answers, scores, page and pictures."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_sorted.benchmark.batches import batch_lines, compare_batches
from megatron_sorted.benchmark.contest import (
    ContestAnswer,
    Contestant,
    answer_question,
    ours,
    theirs,
)
from megatron_sorted.benchmark.curve import curve_lines, draw_curve, quality_curve
from megatron_sorted.benchmark.peer import HUGGING_FACE
from megatron_sorted.benchmark.questions import MultiTurnQuestion, spread
from megatron_sorted.benchmark.scores import Terms, draw, scores_of, write_page
from megatron_sorted.benchmark.sweep import draw_sweep, sweep, sweep_lines
from megatron_sorted.benchmark.trials import FULL, encode_prompts
from megatron_sorted.decoding.requested_strategy import RequestedStrategy
from megatron_sorted.decoding.strategies import SPECULATIVE, STRATEGIES, Strategy
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.evaluation.documents import encode_documents, read_documents
from megatron_sorted.files import write_text_atomically


@dataclass(frozen=True)
class Extras:
    """Further measurements beside the answers to questions.

    Attributes:
        batches: Batch sizes to measure.
        sweep: Whether to run self-speculation at every exit and draft length.
        texts: Files of held-out text whose loss is drawn over speed.
        separator: Separator of the texts of a plain file.
        num_texts: Maximum number of texts of each file.
        num_prompts: Number of prompts for each of these measurements.
    """

    batches: Sequence[int] = ()
    sweep: bool = False
    texts: Sequence[Path] = ()
    separator: str | None = None
    num_texts: int = 100
    num_prompts: int = 12


def strategies_of(
    generator: TextGenerator, choice: RequestedStrategy, names: Sequence[str]
) -> dict[str, Strategy]:
    """Return the named strategies that the model supports, full first."""
    strategies = {}
    for name in dict.fromkeys([FULL, *names]):
        draft = generator.draft_for(STRATEGIES[name])
        if name == FULL or len(generator.network.depths) > 1 or draft is not None:
            strategies[name] = dataclasses.replace(choice, name=name).strategy(
                generator.network, draft
            )
    return strategies


def contestants_of(
    generator: TextGenerator,
    strategies: Mapping[str, Strategy],
    terms: Terms,
    with_transformers: bool,
) -> list[Contestant]:
    """Return our strategies, and transformers' generate with and without its early exit."""
    contestants = [
        ours(name, generator, strategy, terms.max_new_tokens, terms.sampling)
        for name, strategy in strategies.items()
    ]
    if not with_transformers:
        return contestants
    network = generator.network
    early = [depth for depth in network.depths[:-1] if depth <= network.num_layers // 2]
    options = {HUGGING_FACE: {}} | {
        f"{HUGGING_FACE}, assistant_early_exit={depth}": {"assistant_early_exit": depth}
        for depth in early
    }
    contestants += [
        theirs(name, generator, terms.max_new_tokens, terms.sampling, **more)
        for name, more in options.items()
    ]
    return contestants


def compare_strategies(
    generator: TextGenerator,
    questions: Sequence[MultiTurnQuestion],
    strategies: Mapping[str, Strategy],
    contestants: Sequence[Contestant],
    terms: Terms,
    extras: Extras,
    output: Path,
) -> str:
    """Answer every question with every contestant, measure the extras and write all files.

    Args:
        generator: The model.
        questions: The questions.
        strategies: Strategies for the extras, by name.
        contestants: What answers the questions.
        terms: Terms of the comparison.
        extras: Further measurements.
        output: Folder to write to.

    Returns:
        The page.
    """
    for contestant in contestants:  # warm up
        contestant.run(generator.encode("a")[:8])
    answers = [
        answer_question(generator, question, contestants, terms.max_new_tokens, number)
        for number, question in enumerate(tqdm(questions, "answering", unit="question"))
    ]
    output.mkdir(parents=True, exist_ok=True)
    for name in (contestant.name for contestant in contestants):
        records = [
            as_spec_bench(question, name, answer[name])
            for question, answer in zip(questions, answers, strict=True)
        ]
        path = output / f"answers_{name.replace(', ', '_').replace('=', '_')}.jsonl"
        lines = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)
        write_text_atomically(path, lines)
    scores = scores_of(questions, answers, [contestant.name for contestant in contestants])
    draw(scores, terms.title, output / "decoding.png")
    options = {
        name: ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(strategy).items())
        for name, strategy in strategies.items()
    }
    path = output / "decoding.md"
    # written now, so that a failure of the extras loses nothing
    write_page(path, terms, generator, questions, scores, options, [])
    numbers = {
        group: {name: dataclasses.asdict(one) for name, one in row.items()}
        for group, row in scores.items()
    }
    write_text_atomically(output / "decoding.json", json.dumps(numbers, indent=2) + "\n")
    sections = sections_of(generator, questions, strategies, terms, extras, output)
    return write_page(path, terms, generator, questions, scores, options, sections)


def as_spec_bench(question: MultiTurnQuestion, name: str, answer: ContestAnswer) -> dict:
    """Return an answer in the format of Spec-Bench."""
    choice = {
        "index": 0,
        "turns": answer.turns,
        "new_tokens": [len(ids) for ids in answer.ids],
        "wall_time": answer.seconds,
        "decoding_steps": [len(answer.accept_lengths)],
        "accept_lengths": answer.accept_lengths,
    }
    return {
        "question_id": question.id,
        "category": question.category,
        "model_id": name,
        "choices": [choice],
    }


def sections_of(
    generator: TextGenerator,
    questions: Sequence[MultiTurnQuestion],
    strategies: Mapping[str, Strategy],
    terms: Terms,
    extras: Extras,
    output: Path,
) -> list[str]:
    """Measure the extras, draw their pictures and return their lines of the page."""
    if not (extras.batches or extras.sweep or extras.texts):
        return []
    lines, count = [], terms.max_new_tokens
    firsts = [question.turns[0] for question in spread(questions, extras.num_prompts)]
    prompts = encode_prompts(generator, firsts, True, count)
    if extras.batches:
        lines += batch_lines(compare_batches(generator, strategies, prompts, count, extras.batches))
    if extras.sweep and len(generator.network.depths) > 1:
        grid = sweep(generator, prompts, count)
        title = f"{terms.title}: which exit should draft, and how many tokens"
        draw_sweep(grid, title, output / "sweep.png")
        lines += [*sweep_lines(grid), "![Speed-up over draft depth and length](sweep.png)", ""]
    if extras.texts and len(generator.network.depths) > 1:
        texts = [
            document
            for path in extras.texts
            for document in read_documents(path, extras.separator, limit=extras.num_texts)
        ]
        form = generator.form.prompt_form if generator.form.is_stored else None
        documents = encode_documents(texts, generator.tokenizer, append_eos=True, form=form)
        lossless = {name: one for name, one in strategies.items() if isinstance(one, SPECULATIVE)}
        tuned = {}
        if "early_exit" in strategies:
            tuned["early_exit as tuned"] = strategies["early_exit"]
        points = quality_curve(generator, documents, prompts, count, lossless, tuned)
        draw_curve(points, f"{terms.title}: quality over speed", output / "curve.png")
        num_tokens = sum(sum(document.counted) for document in documents)
        names = " and ".join(path.name for path in extras.texts)
        lines += curve_lines(points, f"{num_tokens:,} held-out tokens of {names}")
        lines += ["![Loss over speed](curve.png)", ""]
    return lines
