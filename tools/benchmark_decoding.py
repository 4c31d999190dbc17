"""Compares ways to decode on questions in Spec-Bench's form: ours, transformers' generate, and its assistant_early_exit, in one run.

    python tools/benchmark_decoding.py MODEL --questions questions.jsonl --per-group 10

Every question is answered by every way before the next one, so that a noisy machine is as noisy for all. Writes the answers of each way in
Spec-Bench's form, a page of scores by group, and a picture; with --batches, --sweep (draft depth x length) and --text (quality over speed)
more of both. Options of ways are those of decoding.json beside the model (tools/tune_decoding.py), else usual ones.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from decoding.batches import batch_lines, compare_batches
from decoding.contest import Answer, hold, ours, theirs
from decoding.curve import curve_lines, draw_curve, quality_curve
from decoding.options import add_model_options, add_sampling_options, add_way_options, check_positive, sampling_of, way_of, writer_of
from decoding.peer import HUGGING_FACE
from decoding.questions import CONVERSATION, GROUPS, Question, read_questions, spread
from decoding.scores import draw, scores_of, write_page
from decoding.sweep import draw_sweep, sweep, sweep_lines
from decoding.trials import FULL
from results.tool import run_tool
from tqdm import tqdm

from megatron_sorted.checkpoint.layout import write_text_atomically
from megatron_sorted.decoding.ways import SPECULATIVE, WAYS, Way
from megatron_sorted.decoding.writer import Writer
from megatron_sorted.errors import SettingsError
from megatron_sorted.evaluation.documents import encode_documents, read_documents


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help="JSON lines with question_id, category, turns")
    parser.add_argument("--per-group", type=int, default=80, help="questions of each group at most, evenly spread (%(default)s)")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS),
                        default=["full", "self_speculative", "sorted_speculative", "tree", "early_exit"],
                        help="(%(default)s)")
    parser.add_argument("--without-transformers", action="store_true", help="leave out transformers' generate")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of every turn (%(default)s)")
    parser.add_argument("--batches", type=int, nargs="*", default=[], help="also so many prompts at once, beside transformers")
    parser.add_argument("--sweep", action="store_true", help="also self_speculative at every exit and draft length, with a contour plot")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="also quality over speed, by the loss on these held-out texts")
    parser.add_argument("--text-separator", metavar="TEXT", help="between texts of a plain file")
    parser.add_argument("--num-texts", type=int, default=100, help="of each file at most (%(default)s)")
    parser.add_argument("--num-prompts", type=int, default=12, help="of --batches, --sweep and --text, evenly spread (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_decoding"),
                        help="folder of answers, page and picture (%(default)s)")
    parser.add_argument("--title", help="of the page (default: the model's directory)")
    add_way_options(parser)
    add_sampling_options(parser)
    values = parser.parse_args(arguments)
    if values.way is not None:
        raise SettingsError("--way: several ways are compared. Use --ways.")
    check_positive(values, "per_group", "max_new_tokens", "num_texts", "num_prompts")
    return values


def as_spec_bench(question: Question, name: str, answer: Answer) -> dict:
    """Returns an answer in Spec-Bench's form."""
    choice = {"index": 0, "turns": answer.turns, "new_tokens": [len(ids) for ids in answer.ids], "wall_time": answer.seconds,
              "decoding_steps": [len(answer.accept_lengths)], "accept_lengths": answer.accept_lengths}
    return {"question_id": question.id, "category": question.category, "model_id": name, "choices": [choice]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Asks, measures and writes."""
    values = read_arguments(arguments)
    questions = read_questions(values.questions)
    groups = [CONVERSATION, *GROUPS.values()]
    chosen = [question for group in groups for question in spread([one for one in questions if one.group == group], values.per_group)]
    sampling, writer = sampling_of(values), writer_of(values)
    print(writer.form.line, file=sys.stderr, flush=True)
    network, contestants, ways = writer.network, [], {}
    for name in dict.fromkeys([FULL, *values.ways]):
        draft = writer.draft_for(WAYS[name])
        if name == FULL or len(network.depths) > 1 or draft is not None:
            way = way_of(argparse.Namespace(**{**vars(values), "way": name}), network, draft)
            ways[name] = way
            contestants.append(ours(name, writer, way, values.max_new_tokens, sampling))
    if not values.without_transformers:
        contestants.append(theirs(HUGGING_FACE, writer, values.max_new_tokens, sampling))
        contestants += [theirs(f"{HUGGING_FACE}, assistant_early_exit={depth}", writer, values.max_new_tokens, sampling,
                               assistant_early_exit=depth) for depth in network.depths[:-1] if depth <= network.num_layers // 2]
    for contestant in contestants:  # what is made at the first use is not measured
        contestant.run(writer.encode("a")[:8])
    answers = [hold(writer, question, contestants, values.max_new_tokens, turn)
               for turn, question in enumerate(tqdm(chosen, "asking", unit="question"))]
    values.output.mkdir(parents=True, exist_ok=True)
    for contestant in contestants:
        lines = [json.dumps(as_spec_bench(question, contestant.name, answer[contestant.name]), ensure_ascii=False)
                 for question, answer in zip(chosen, answers, strict=True)]
        place = values.output / f"answers_{contestant.name.replace(', ', '_').replace('=', '_')}.jsonl"
        write_text_atomically(place, "\n".join(lines) + "\n")
    title = values.title or values.model.resolve().name
    scores = scores_of(chosen, answers, [contestant.name for contestant in contestants])
    draw(scores, title, values.output / "decoding.png")
    options = [f"`{name}`: {', '.join(f'{key} {value}' for key, value in dataclasses.asdict(way).items()) or 'no options'}"
               for name, way in ways.items()]
    place = values.output / "decoding.md"
    write_page(place, title, values, writer, chosen, scores, options, [])  # what took long is kept, whatever happens to the rest
    write_text_atomically(values.output / "decoding.json", json.dumps(
        {group: {name: dataclasses.asdict(one) for name, one in row.items()} for group, row in scores.items()}, indent=2) + "\n")
    print(write_page(place, title, values, writer, chosen, scores, options, more_sections(values, writer, chosen, ways, title)))
    print(f"written: {values.output}/decoding.md, decoding.json, pictures and the answers")


def more_sections(values: argparse.Namespace, writer: Writer, questions: Sequence[Question], ways: dict[str, Way], title: str) -> list[str]:
    """Returns the lines of what is asked for beside the questions, after drawing its pictures."""
    room, lines = writer.network.max_positions - values.max_new_tokens, []
    prompts = [writer.encode_chat([{"role": "user", "content": question.turns[0]}])[-room:]
               for question in spread(questions, values.num_prompts)]
    if values.batches:
        lines += batch_lines(compare_batches(writer, ways, prompts, values.max_new_tokens, values.batches))
    if values.sweep and len(writer.network.depths) > 1:
        grid = sweep(writer, prompts, values.max_new_tokens)
        draw_sweep(grid, f"{title}: which exit should draft, and how many tokens", values.output / "sweep.png")
        lines += [*sweep_lines(grid), "![Speed-up over draft depth and length](sweep.png)", ""]
    if values.text and len(writer.network.depths) > 1:
        texts = [one for path in values.text for one in read_documents(path, values.text_separator, limit=values.num_texts)]
        form = writer.form.prompt_form if writer.form.is_stored else None
        documents = encode_documents(texts, writer.tokenizer, append_eos=True, form=form)
        lossless = {name: way for name, way in ways.items() if isinstance(way, SPECULATIVE)}
        tuned = {"early_exit as tuned": ways["early_exit"]} if "early_exit" in ways else {}
        points = quality_curve(writer, documents, prompts, values.max_new_tokens, lossless, tuned)
        draw_curve(points, f"{title}: quality over speed", values.output / "curve.png")
        names = " and ".join(path.name for path in values.text)
        lines += [*curve_lines(points, f"{sum(sum(document.counted) for document in documents):,} held-out tokens of {names}"),
                  "![Loss over speed](curve.png)", ""]
    return lines


if __name__ == "__main__":
    run_tool(main, "Nothing was written.")
