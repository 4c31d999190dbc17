"""Measure llama.cpp with a nested model's files, with and without the first layers as a draft.

    python -m lab.build_llama_cpp                          once: llama.cpp from its sources
    megatron-sorted convert gguf MODEL FILES --type f32 bf16 q8_0 q4_k_m
    python -m lab.bench_llama_cpp MODEL --files FILES --questions questions.jsonl

Servers of all types, with and without the draft of decoding.json, take turns. Writes
docs/results/llama_cpp.md and llama_cpp.json.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from lab.contests.models import question_prompts
from lab.llama_cpp.page import page
from lab.llama_cpp.turns import PLAIN, Files, Row, agreement_of, served_models, take_turns
from megatron_sorted.benchmark.questions import read_questions
from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.conversion.origins import whole_network
from megatron_sorted.errors import PlatformError
from megatron_sorted.files import write_text_atomically
from megatron_sorted.llama_cpp.draft_settings import DraftSettings, draft_settings
from megatron_sorted.llama_cpp.next_tokens import Agreement
from megatron_sorted.llama_cpp.programs import SERVER, find_llama_cpp
from megatron_sorted.llama_cpp.server import LlamaServer
from megatron_sorted.llama_cpp.source_directory import end_ids
from megatron_sorted.settings.derived import exit_depths

KINDS = ("f32", "bf16", "q8_0", "q4_k_m")
MOST_PROMPT_TOKENS = 512


def read_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="Hugging Face directory with exits and a decoding.json")
    add("--files", type=Path, required=True, help="directory that convert gguf wrote")
    add("--questions", type=Path, required=True, help="JSON lines of Spec-Bench")
    add("--per-group", type=int, default=4, help="questions of each group (%(default)s)")
    add("--kinds", nargs="+", default=list(KINDS), help="types of weights (all four)")
    add("--tokens", type=int, default=64, help="new tokens of a text (%(default)s)")
    add("--rounds", type=int, default=5, help="(%(default)s)")
    add("--threads", type=int, default=2, help="(%(default)s)")
    add("--llama-cpp", type=Path, help="folder of llama.cpp's build")
    add("--output", type=Path, default=Path("docs/results"), help="folder (%(default)s)")
    return parser.parse_args()


def write_raw(
    path: Path, rows: list[Row], command: str, draft: DraftSettings,
    agreements: Mapping[str, Agreement],
) -> None:  # fmt: skip
    """Write all rows as JSON, one a line."""
    head = {
        "command": command,
        "draft": dataclasses.asdict(draft),
        "agreements": {kind: dataclasses.asdict(one) for kind, one in agreements.items()},
    }
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, f'{json.dumps(head)[:-1]},\n"rows": [\n{lines}\n]}}\n')


def main() -> None:
    """Measure, and write the page."""
    values = read_arguments()
    program = find_llama_cpp(values.llama_cpp).server
    if program is None:
        raise PlatformError(f"{SERVER}: not found. Run python -m lab.build_llama_cpp.")
    model = open_model(values.model)
    layers, name = model.settings.num_layers, values.model.resolve().name
    files = Files(values.files, name, layers)
    draft = draft_settings(values.model, exit_depths(model.settings))
    questions = read_questions(values.questions)
    groups = question_prompts(values.model, questions, values.per_group, MOST_PROMPT_TOKENS)
    prompts = [prompt for group in groups.values() for prompt in group]
    context = MOST_PROMPT_TOKENS + values.tokens + 64
    rows, texts = [], {}
    shown = [Path(one).name if Path(one).is_absolute() else one for one in sys.argv[1:]]
    command = shlex.join(["python", "-m", "lab.bench_llama_cpp", *shown])
    raw = values.output / "llama_cpp.json"
    with contextlib.ExitStack() as stack:
        served = served_models(program, files, values.kinds, draft, values.threads, context)
        servers = {}
        for key, one in served.items():
            servers[key] = LlamaServer(one)
            stack.callback(servers[key].stop)
        with tqdm(total=values.rounds * len(servers), unit="turn") as progress:
            for new, texts in take_turns(  # noqa: B007
                servers, prompts, values.tokens, values.rounds, progress.update
            ):
                rows += new
                write_raw(raw, rows, command, draft, {})  # a stopped measurement keeps its rounds
    ends = end_ids(whole_network(model))
    agreements = {
        kind: agreement_of(model, layers, kind, prompts, texts[kind, PLAIN], ends)
        for kind in tqdm(values.kinds, "compared with transformers")
    }
    load = " to ".join(f"{one:.0f}" for one in (min(os.getloadavg()), max(os.getloadavg())))
    setting = f"{values.threads} threads; load average {load}"
    text = page(rows, files, values.kinds, draft, agreements, command, setting, raw)
    write_raw(raw, rows, command, draft, agreements)
    write_text_atomically(values.output / "llama_cpp.md", text)
    print(text)


if __name__ == "__main__":
    run_main(main, "Nothing was written.")
