"""A fair contest of decoders on a CPU: ours, transformers and llama.cpp, in turns.

    python -m lab.build_llama_cpp                          once: llama.cpp from its sources
    python -m lab.contest                                  plain speed, prompts, batches
    python -m lab.contest MODEL --questions questions.jsonl
                                                           and every lossless strategy of MODEL
    python -m lab.contest MODEL --questions FILE --tenth   about a tenth: 3 rounds, a third of the
                                                           prompts, half the tokens
    python -m lab.contest --quick --without-llama-cpp      tries it in seconds, no useful numbers

The parts are a: `full`, b: a prompt of 1,000 tokens, c: batches (all three with random weights),
d: lossless strategies of MODEL, or of a random model whose exit often agrees. Rows are kept after
every round; the same command continues. Writes docs/results/contest.md and contest.json, and
docs/images/contest.png.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from lab.build_llama_cpp import default_folder, find_build
from lab.contests.entrants import OUR_KINDS, Entrants, Peer, draft_depth_of
from lab.contests.gguf import KINDS
from lab.contests.memory import MemoryReader
from lab.contests.models import QUICK_SHAPES, SHAPES, question_prompts, random_prompts, write_model
from lab.contests.page import page
from lab.contests.picture import draw
from lab.contests.rounds import Match, Store, play
from megatron_sorted.benchmark.questions import read_questions
from megatron_sorted.decoding.network import load_network
from megatron_sorted.decoding.tuning.tuned_options import (
    TUNED_FILE,
    WeightsInUse,
    read_tuned_options,
)
from megatron_sorted.errors import SettingsError
from megatron_sorted.files import write_text_atomically

BATCHES = (1, 4, 8, 16)
SLOT_KINDS = ("F32", "BF16", "Q8_0")
CONTEXT = 2048


def read_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, nargs="?", help="Hugging Face directory with exits, for part d")
    add("--questions", type=Path, help="JSON lines with question_id, category, turns, for part d")
    add("--parts", nargs="+", choices="abcd", default=list("abcd"), help="(all)")
    add("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (1 2)")
    add("--rounds", type=int, default=9, help="(%(default)s)")
    add("--prompts", type=int, default=6, help="prompts of part a (%(default)s)")
    add("--per-group", type=int, default=3, help="questions of each group (%(default)s)")
    add("--tokens", type=int, default=64, help="new tokens of a text (%(default)s)")
    add("--draft-tokens", type=int, default=4, help="llama.cpp's longest draft (%(default)s)")
    add("--as-tuned", action="store_true", help="options of MODEL/decoding.json for every kind")
    add("--shapes", nargs="+", default=[one.name for one in SHAPES], help="of parts a to c")
    add("--llama-cpp", type=Path, default=default_folder(), help="folder of its build")
    add("--without-llama-cpp", action="store_true", help="leave llama.cpp out")
    add("--work", type=Path, help="folder of converted models (default: in --llama-cpp)")
    add("--output", type=Path, default=Path("docs"), help="folder (%(default)s)")
    add("--tenth", action="store_true", help="3 rounds, fewer prompts, 32 tokens")
    add("--quick", action="store_true", help="a tiny model, 2 rounds")
    values = parser.parse_args()
    if values.tenth:
        values.rounds, values.per_group, values.prompts, values.tokens = 3, 1, 2, 32
    if values.quick:
        values.rounds, values.per_group, values.prompts, values.tokens = 2, 1, 2, 8
        values.threads = values.threads[:1]
    if values.questions and not values.model:
        raise SettingsError("--questions: there is no MODEL to answer them. Name one before it.")
    return values


class Contest:
    """The whole contest with its settings."""

    def __init__(self, values: argparse.Namespace):
        """Find llama.cpp, write the random models, and read what an earlier run has left."""
        self.values = values
        work = (values.work or values.llama_cpp / "models").absolute()
        work.mkdir(parents=True, exist_ok=True)
        self.shapes = (
            QUICK_SHAPES if values.quick else [one for one in SHAPES if one.name in values.shapes]
        )
        self.long = 64 if values.quick else 1000
        self.peer = None
        if not values.without_llama_cpp:
            build = find_build(values.llama_cpp.absolute())
            self.peer = Peer(build, work, CONTEXT, values.draft_tokens)
        self.plain = {one.name: write_model(one, work, CONTEXT) for one in self.shapes}
        self.nested = values.model or write_model(self.shapes[0], work, CONTEXT, True)
        settings = {
            "prompts": values.prompts,
            "per_group": values.per_group,
            "num_tokens": values.tokens,
            "nested": self.nested.resolve().name,
            "draft_tokens": values.draft_tokens,
        }
        self.store = Store(values.output / "results" / "contest.json", settings)
        self.memory = MemoryReader(1 << 26 if values.quick else 1 << 30)

    def matches(self, part: str, threads: int) -> Iterator[tuple[Match, Path]]:
        """Yield the matches of a part with the directories of their models."""
        tokens = self.values.tokens
        if part == "d":
            groups, _ = self._questions()
            yield Match("d", threads, self.nested.resolve().name, groups, tokens), self.nested
            return
        for shape in self.shapes:
            size, directory = shape.vocabulary, self.plain[shape.name]
            if part == "a":
                groups = {"": random_prompts(self.values.prompts, 16, size)}
                yield Match("a", threads, shape.name, groups, tokens), directory
            elif part == "b":
                groups = {f"{self.long} tokens": random_prompts(1, self.long, size, 1)}
                yield Match("b", threads, shape.name, groups, 1), directory
            elif shape == self.shapes[0]:
                groups = {f"batch {count}": random_prompts(count, 16, size) for count in BATCHES}
                yield Match("c", threads, shape.name, groups, tokens, True), directory

    def run(self) -> None:
        """Play every match that is not complete; write page and picture after each."""
        for threads in self.values.threads:
            for part in self.values.parts:
                for match, directory in self.matches(part, threads):
                    done = self.store.rounds_of(match)
                    if done >= self.values.rounds:
                        continue
                    entrants = Entrants(directory, threads, self.peer)
                    try:
                        self._play(match, entrants, range(done, self.values.rounds))
                    finally:
                        entrants.close()
                    self.write_page()

    def write_page(self) -> None:
        """Write the page and the picture of all rows."""
        output = self.values.output
        shown = [Path(one).name if Path(one).is_absolute() else one for one in sys.argv[1:]]
        command = shlex.join(["python", "-m", "lab.contest", *shown])
        text = page(self.store.rows, self.store.facts, self.store.settings, command)
        write_text_atomically(output / "results" / "contest.md", text)
        draw(self.store.rows, output / "images" / "contest.png")

    def _play(self, match: Match, entrants: Entrants, rounds: range) -> None:
        contenders = self._contenders(match, entrants)
        with tqdm(total=len(rounds) * len(contenders), desc=match.key, unit="turn") as progress:
            for rows in play(
                match, contenders, rounds, self.memory.bytes_a_second, progress.update
            ):
                self.store.add(rows)

    def _contenders(self, match: Match, entrants: Entrants) -> list:
        tuned = self._tuned(match, entrants) if match.part == "d" else None
        contenders = [*entrants.ours(OUR_KINDS, tuned), *entrants.by_torch()]
        if match.part == "c":
            return [*contenders, *entrants.llama(SLOT_KINDS, slots=max(BATCHES))]
        contenders += entrants.llama(KINDS)
        if tuned is not None:
            depth = draft_depth_of(tuned[OUR_KINDS[0]], entrants.network(OUR_KINDS[0]))
            contenders += entrants.llama(KINDS, draft_depth=depth)
        return contenders

    def _tuned(self, match: Match, entrants: Entrants) -> dict:
        """Return options of strategies for each kind, measured here unless --as-tuned."""
        kept = self.store.facts.setdefault("tuned", {})
        options = {}
        for kind in OUR_KINDS:
            key = f"{match.threads} threads, {kind}"
            if self.values.as_tuned:
                weights = WeightsInUse(kind, True)
                record = read_tuned_options(self.nested / TUNED_FILE, weights=weights)
                kept[key] = record.get("strategies", {})
            elif key not in kept:
                _, prompts = self._questions()
                count = min(self.values.tokens, 64)
                kept |= {key: entrants.tuned([kind], prompts, count)[kind]}
            options[kind] = kept[key]
        self.store.write()
        return options

    def _questions(self) -> tuple[dict[str, list[list[int]]], list[list[int]]]:
        """Return the prompts of part d by group, and others on which strategies are tuned."""
        values = self.values
        most = CONTEXT - values.tokens - 8 - 64  # a draft needs slots too
        if values.questions:
            network = load_network(self.nested, native="off")
            most = min(most, network.max_positions - values.tokens - 72)
            questions = read_questions(values.questions)
            groups = question_prompts(self.nested, questions, values.per_group + 2, most)
            questions_of = {name: prompts[1:-1] for name, prompts in groups.items()}
            others = [one for prompts in groups.values() for one in (prompts[0], prompts[-1])]
            return questions_of, others
        vocabulary = self.shapes[0].vocabulary
        others = random_prompts(12, 16, vocabulary, 3)
        return {"random": random_prompts(values.prompts, 16, vocabulary, 2)}, others


def main() -> None:
    """Run the contest."""
    Contest(read_arguments()).run()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers are to end, too
    run_main(main, "Complete rounds are kept; the same command continues.")
