"""Measure our server with many clients, beside an earlier version and the servers of others.

    python -m lab.bench_serving MODEL --questions questions.jsonl
                                        this version alone
    python -m lab.build_llama_cpp       once: llama.cpp from its sources
    python -m lab.bench_serving MODEL --questions FILE --before DIR --llama-cpp FOLDER
        --transformers-python PYTHON --vllm-python PYTHON
                                        beside a checkout of an earlier version, and others
    python -m lab.bench_serving MODEL --questions FILE --vllm-python PYTHON --plug-in
        --parts throughput --kinds float32 --clients 1 8 16 32 --page engines
                                        vLLM alone, with our plug-in, and with an extracted draft
    python -m lab.bench_serving MODEL --questions FILE --quick
                                        tries it in seconds, no useful numbers

MODEL is a Hugging Face directory with exits. transformers needs transformers[serving] in the named
Python, vLLM its own; the plug-in drafts by load as ``tune --engine vllm`` has stored it. Rows are
kept after every turn; the same command continues. Writes docs/benchmarks/serving.md and
serving.json, and docs/images/serving.png.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import shlex
import signal
import sys
import tempfile
from pathlib import Path

from lab.contests.rounds import Store
from lab.serving.contenders import LLAMA_KINDS
from lab.serving.entrants import Entrants
from lab.serving.measure import Measurement
from lab.serving.page import page
from lab.serving.parts import LONG_PROMPT, PREFIXES, THROUGHPUT
from lab.serving.picture import draw
from lab.serving.servers import Servers
from megatron_sorted.files import write_text_atomically

PARTS = (PREFIXES, LONG_PROMPT, THROUGHPUT)


def read_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="Hugging Face directory with exits")
    add("--questions", type=Path, required=True,
        help="JSON lines with question_id, category, turns")  # fmt: skip
    add("--before", type=Path, metavar="DIR", help="checkout of an earlier version")
    add("--llama-cpp", type=Path, metavar="FOLDER", help="folder of lab.build_llama_cpp")
    add("--transformers-python", type=Path, metavar="PYTHON", help="with transformers[serving]")
    add("--vllm-python", type=Path, metavar="PYTHON", help="with vLLM")
    add("--without-vllm", metavar="REASON", help="why vLLM takes no part, for the page")
    add("--vllm-options", default="", metavar="WORDS", help="of all its forms, in one argument")
    add("--plug-in", action="store_true", help="vLLM with our plug-in and a draft model, too")
    add("--page", default="serving", metavar="NAME", help="of page and picture (%(default)s)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(all)")
    add("--kinds", nargs="+", choices=tuple(LLAMA_KINDS), default=list(LLAMA_KINDS), help="(all)")
    add("--clients", type=int, nargs="+", default=[1, 4, 16, 32], help="(1 4 16 32)")
    add("--threads", type=int, default=1, help="of every server (%(default)s)")
    add("--rounds", type=int, default=3, help="(%(default)s)")
    add("--tokens", type=int, default=64, help="new tokens of a text (%(default)s)")
    add("--texts", type=int, default=32, help="of a turn, one a client at least (%(default)s)")
    add("--turn-seconds", type=float, default=4.0,
        help="after which no text of a turn is begun (%(default)s)")  # fmt: skip
    add("--long-tokens", type=int, default=4000, help="of the long prompt (%(default)s)")
    add("--exit-layer", type=int, help="of self-speculation (the server's default)")
    add("--draft-tokens", type=int, default=4, help="(%(default)s)")
    add("--minutes", type=float, default=1e9, help="begin no round that would end later")
    add("--work", type=Path, help="folder of copies and logs (a temporary one)")
    add("--output", type=Path, default=Path("docs"), help="folder (%(default)s)")
    add("--quick", action="store_true", help="few and short texts of float32, one round")
    values = parser.parse_args()
    if values.quick:
        values.kinds, values.clients, values.rounds = ["float32"], [1, 2], 1
        values.tokens, values.texts, values.long_tokens = 8, 2, 64
    return values


def write_page(store: Store, output: Path, name: str) -> None:
    """Write the page and the picture of all rows."""
    shown = [Path(one).name if Path(one).is_absolute() else one for one in sys.argv[1:]]
    command = shlex.join(["python", "-m", "lab.bench_serving", *shown])
    text = page(store.rows, store.facts, store.settings, command, name)
    write_text_atomically(output / "benchmarks" / f"{name}.md", text)
    draw(store.rows, output / "images" / f"{name}.png")


def measure(values: argparse.Namespace, work: Path) -> None:
    """Measure what is not kept yet."""
    entrants, servers = Entrants(values, work), Servers(work / "logs")
    settings = {
        "model": values.model.resolve().name, "threads": values.threads,
        "num_tokens": values.tokens, "texts": values.texts, "long_tokens": values.long_tokens,
        "exit_layer": values.exit_layer, "draft_tokens": values.draft_tokens,
        "num_prompts": len(entrants.prompts),
    }  # fmt: skip
    store = Store(values.output / "benchmarks" / f"{values.page}.json", settings)
    contenders = entrants.contenders()
    store.facts |= {"absent": entrants.absent, "versions": entrants.versions}
    measurement = Measurement(
        store, servers, entrants.size, values.clients, entrants.prompts, entrants.long,
        values.minutes, contenders,
    )  # fmt: skip
    try:
        measurement.run(values.rounds, lambda: write_page(store, values.output, values.page))
    finally:
        servers.keep_only(set())
    write_page(store, values.output, values.page)
    print(values.output / "benchmarks" / f"{values.page}.md")


def main() -> None:
    """Run the measurement."""
    values = read_arguments()
    if values.work:
        measure(values, values.work.absolute())
        return
    with tempfile.TemporaryDirectory() as work:
        measure(values, Path(work))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers are to end, too
    run_main(main, "Rows are kept; the same command continues.")
