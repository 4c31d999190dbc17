"""A comparison of ways to decode, from the questions to the files: answers, scores, page and pictures."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_sorted.benchmark.batches import batch_lines, compare_batches
from megatron_sorted.benchmark.contest import ContestAnswer, Contestant, hold, ours, theirs
from megatron_sorted.benchmark.curve import curve_lines, draw_curve, quality_curve
from megatron_sorted.benchmark.peer import HUGGING_FACE
from megatron_sorted.benchmark.questions import MultiTurnQuestion, spread
from megatron_sorted.benchmark.scores import Terms, draw, scores_of, write_page
from megatron_sorted.benchmark.sweep import draw_sweep, sweep, sweep_lines
from megatron_sorted.benchmark.trials import FULL, encode_prompts
from megatron_sorted.decoding.choice import StrategyChoice
from megatron_sorted.decoding.strategies import SPECULATIVE, STRATEGIES, Strategy
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.evaluation.documents import encode_documents, read_documents
from megatron_sorted.files import write_text_atomically


@dataclass(frozen=True)
class Extras:
    """What is measured beside the answers to questions.

    Attributes:
        batches: Numbers of prompts at once.
        sweep: Whether self-speculation is tried at every exit and draft length.
        texts: Held-out files whose loss is drawn over speed.
        separator: What stands between texts of a plain file.
        num_texts: Texts of each file at most.
        num_prompts: Prompts that each of these goes on with.
    """

    batches: Sequence[int] = ()
    sweep: bool = False
    texts: Sequence[Path] = ()
    separator: str | None = None
    num_texts: int = 100
    num_prompts: int = 12


def strategies_of(
    writer: TextGenerator, choice: StrategyChoice, names: Sequence[str]
) -> dict[str, Strategy]:
    """Return the ways of these names that the model supports, the full model's first."""
    strategies = {}
    for name in dict.fromkeys([FULL, *names]):
        draft = writer.draft_for(STRATEGIES[name])
        if name == FULL or len(writer.network.depths) > 1 or draft is not None:
            strategies[name] = dataclasses.replace(choice, name=name).strategy(
                writer.network, draft
            )
    return strategies


def contestants_of(
    writer: TextGenerator, strategies: Mapping[str, Strategy], terms: Terms, with_transformers: bool
) -> list[Contestant]:
    """Return what answers: our ways, and transformers' own generate with and without its early exit."""
    found = [
        ours(name, writer, strategy, terms.max_new_tokens, terms.sampling)
        for name, strategy in strategies.items()
    ]
    if with_transformers:
        network = writer.network
        found.append(theirs(HUGGING_FACE, writer, terms.max_new_tokens, terms.sampling))
        found += [
            theirs(
                f"{HUGGING_FACE}, assistant_early_exit={depth}",
                writer,
                terms.max_new_tokens,
                terms.sampling,
                assistant_early_exit=depth,
            )
            for depth in network.depths[:-1]
            if depth <= network.num_layers // 2
        ]
    return found


def compare_strategies(
    writer: TextGenerator,
    questions: Sequence[MultiTurnQuestion],
    strategies: Mapping[str, Strategy],
    contestants: Sequence[Contestant],
    terms: Terms,
    extras: Extras,
    output: Path,
) -> str:
    """Ask every question of every contestant, measure the extras, write all of it into a folder, and return the page."""
    for contestant in contestants:  # what is made at the first use is not measured
        contestant.run(writer.encode("a")[:8])
    answers = [
        hold(writer, question, contestants, terms.max_new_tokens, turn)
        for turn, question in enumerate(tqdm(questions, "asking", unit="question"))
    ]
    output.mkdir(parents=True, exist_ok=True)
    for contestant in contestants:
        lines = [
            json.dumps(
                as_spec_bench(question, contestant.name, answer[contestant.name]),
                ensure_ascii=False,
            )
            for question, answer in zip(questions, answers, strict=True)
        ]
        place = output / f"answers_{contestant.name.replace(', ', '_').replace('=', '_')}.jsonl"
        write_text_atomically(place, "\n".join(lines) + "\n")
    scores = scores_of(questions, answers, [contestant.name for contestant in contestants])
    draw(scores, terms.title, output / "decoding.png")
    options = [
        f"`{name}`: {', '.join(f'{key} {value}' for key, value in dataclasses.asdict(strategy).items()) or 'no options'}"
        for name, strategy in strategies.items()
    ]
    place = output / "decoding.md"
    write_page(
        place, terms, writer, questions, scores, options, []
    )  # what took long is kept, whatever happens to the rest
    write_text_atomically(
        output / "decoding.json",
        json.dumps(
            {
                group: {name: dataclasses.asdict(one) for name, one in row.items()}
                for group, row in scores.items()
            },
            indent=2,
        )
        + "\n",
    )
    return write_page(
        place,
        terms,
        writer,
        questions,
        scores,
        options,
        sections_of(writer, questions, strategies, terms, extras, output),
    )


def as_spec_bench(question: MultiTurnQuestion, name: str, answer: ContestAnswer) -> dict:
    """Return an answer in Spec-Bench's form."""
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
    writer: TextGenerator,
    questions: Sequence[MultiTurnQuestion],
    strategies: Mapping[str, Strategy],
    terms: Terms,
    extras: Extras,
    output: Path,
) -> list[str]:
    """Return the lines of the extras, after drawing their pictures."""
    if not (extras.batches or extras.sweep or extras.texts):
        return []
    lines, count = [], terms.max_new_tokens
    prompts = encode_prompts(
        writer,
        [question.turns[0] for question in spread(questions, extras.num_prompts)],
        True,
        count,
    )
    if extras.batches:
        lines += batch_lines(compare_batches(writer, strategies, prompts, count, extras.batches))
    if extras.sweep and len(writer.network.depths) > 1:
        grid = sweep(writer, prompts, count)
        draw_sweep(
            grid,
            f"{terms.title}: which exit should draft, and how many tokens",
            output / "sweep.png",
        )
        lines += [*sweep_lines(grid), "![Speed-up over draft depth and length](sweep.png)", ""]
    if extras.texts and len(writer.network.depths) > 1:
        texts = [
            one
            for path in extras.texts
            for one in read_documents(path, extras.separator, limit=extras.num_texts)
        ]
        form = writer.form.prompt_form if writer.form.is_stored else None
        documents = encode_documents(texts, writer.tokenizer, append_eos=True, form=form)
        lossless = {
            name: strategy
            for name, strategy in strategies.items()
            if isinstance(strategy, SPECULATIVE)
        }
        tuned = (
            {"early_exit as tuned": strategies["early_exit"]} if "early_exit" in strategies else {}
        )
        points = quality_curve(writer, documents, prompts, count, lossless, tuned)
        draw_curve(points, f"{terms.title}: quality over speed", output / "curve.png")
        names = " and ".join(path.name for path in extras.texts)
        lines += [
            *curve_lines(
                points,
                f"{sum(sum(document.counted) for document in documents):,} held-out tokens of {names}",
            ),
            "![Loss over speed](curve.png)",
            "",
        ]
    return lines
