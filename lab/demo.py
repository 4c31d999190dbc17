"""Train a tiny nested model and an ordinary one on true facts, and show what the first layers of
both can do.

    python -m lab.demo            3 to 4 minutes on 2 idle CPU cores, nothing is downloaded
    python -m lab.demo --quick    the same steps with next to no training, to see whether everything
    runs

Finished steps are not repeated; --fresh repeats them.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lab.results.steps import Runner, Step, StepError
from megatron_sorted.installation import ROOT
from megatron_sorted.reading.json_lines import first_record
from megatron_sorted.reading.json_text import read_json_object
from megatron_sorted.settings.yaml_file import read_yaml

CONFIG = ROOT / "examples" / "demo_nested.yaml"

# Few enough that both models have learned them after a minute or so of training.
QUESTIONS = (
    "--asking-locales",
    "en",
    "--kinds",
    "territory",
    "language",
    "month",
    "weekday",
    "--max-name-length",
    "12",
    "--locales",
    "de",
    "fr",
    "es",
    "it",
    "fi",
    "tr",
    "pl",
    "sv",
    "pt",
    "nl",
    "cs",
    "hu",
    "ru",
    "el",
    "ja",
    "zh",
)
OPENING = """\
A nested language model is one network with several exits: after some of its layers, and not
only after the last, a norm and an output head are trained to predict the next token. So its first
layers are models by themselves: train once, run what you can afford.

This demo trains a tiny nested model, whose first {depths} layers are models, and
an ordinary one, in which only all layers together are trained to answer: same size, same data, same
number of steps. Then it tests every prefix of both.
It takes about {minutes:.0f} minute(s) on 2 idle CPU cores and writes everything to {folder}."""

HOW_TO_READ = """\
How to read the table: a row is one sub-model: the first `depth` layers, the norm, the head.
  phrasing  questions about trained facts in new wordings: what the sub-model has learned
  unseen    questions about facts that training did not contain: what guessing achieves
  loss      mean over the tokens of the answers, in nats; lower is better
  exact     share of questions whose answer is the most likely one at every token; higher is better
These facts need few layers, so longer prefixes of the ordinary model are good as well:
docs/demo.md explains it."""

AFTERWARDS = """What to do with the model in {model} (each line can be copied and run)
{commands}
The question above was in the training data; its answer is {answer!r}.
Use `--chat` instead of the prompt for a conversation.
To send a request to the running server:
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d {request}

What to try next
  your own data      {python} -m megatron_sorted prepare --help
  other exits        change exit-layer-nums in examples/demo_nested.yaml; then {python} -m lab.demo
  more questions     {python} -m lab.make_cldr_questions --output runs/questions --num-samples 20000
  larger models      examples/llama2_7b_8gpu.yaml, examples/llama2_13b_soft.yaml"""


def exit_depths() -> list[int]:
    """Return the depths at which the example's network is a model, the last layer included."""
    example = {entry.key: entry.value for entry in read_yaml(str(CONFIG))}
    return [*example["exit-layer-nums"], example["num-layers"]]


def demo_steps(folder: Path, quick: bool) -> list[Step]:
    """Return the steps in order; every path they write is inside ``folder``, and commands run in
    the project's folder.
    """
    folder = (
        folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    )  # commands that can be read and copied
    python, data = sys.executable, folder / "data"
    ours = (python, "-m", "megatron_sorted")
    tokenizer = data / "train_tokenizer.model"
    facts, questions, vocabulary = ("40", "40", "600") if quick else ("500", "1000", "1500")
    few_steps = ("--train-iters", "6", "--lr-warmup-iters", "2") if quick else ()

    def prepare(name: str) -> Step:
        source = (
            ("--train-tokenizer", vocabulary)
            if name == "train"
            else ("--tokenizer-model", str(tokenizer))
        )
        command = (
            *ours,
            "prepare",
            "--input",
            str(data / f"{name}.jsonl"),
            "--output-prefix",
            str(data / name),
            "--seq-length",
            "128",
            "--workers",
            "2",
            "--overwrite",
            *source,
        )
        makes = tuple(data / f"{name}_text_document{ending}" for ending in (".bin", ".idx"))
        purpose = {
            "train": "Train a tokenizer on the training questions and tokenize them",
            "phrasing": "Tokenize the first test: trained facts in new wordings",
            "unseen": "Tokenize the second test: facts that are not trained",
        }[name]
        made = makes + ((tokenizer,) if name == "train" else ())
        return Step(f"prepare-{name}", purpose, command, made, seconds=10 if name == "train" else 3)

    def train(name: str, purpose: str, *flags: str) -> Step:
        save = folder / name
        valid = [str(data / f"{kind}_text_document") for kind in ("phrasing", "unseen")]
        command = (
            python,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "pretrain_sorted.py",
            "--config",
            str(CONFIG.relative_to(ROOT)),
            "--data-path",
            str(data / "train_text_document"),
            "--valid-data-path",
            *valid,
            "--tokenizer-model",
            str(tokenizer),
            "--save",
            str(save),
            *few_steps,
            *flags,
        )
        return Step(
            f"train-{name}",
            purpose,
            command,
            (save / "evaluation.json",),
            (save,),
            reads=(CONFIG,),
            seconds=20 if quick else 90,
        )

    steps = [
        Step(
            "questions",
            "Write questions such as `How do you say Monday in Chinese?`, with true answers from "
            "Unicode CLDR",
            (
                python,
                "-m",
                "lab.make_cldr_questions",
                "--output",
                str(data),
                *QUESTIONS,
                "--max-facts",
                facts,
                "--num-eval-samples",
                questions,
            ),
            tuple(data / f"{name}.jsonl" for name in ("train", "phrasing", "unseen")),
            seconds=5,
        ),
        *map(prepare, ("train", "phrasing", "unseen")),
        train(
            "nested",
            "Train the nested model, half of its layers on each of 2 processes; `@N` is the loss "
            "after N layers",
        ),
        train(
            "plain",
            "Train the ordinary model for the same number of steps; its only loss is after the "
            "last layer",
            "--exit-layer-weight",
            *["0"] * (len(exit_depths()) - 1),
        ),
        Step(
            "export",
            "Export the nested model as a Hugging Face directory",
            (
                *ours,
                "convert",
                "export",
                str(folder / "nested"),
                str(folder / "nested_hf"),
                "--overwrite",
            ),
            (folder / "nested_hf",),
            seconds=15,
        ),
        Step(
            "picture",
            "Compare every prefix of both models",
            (
                *ours,
                "report",
                str(folder / "nested" / "evaluation.json"),
                str(folder / "plain" / "evaluation.json"),
                "--output",
                str(folder / "exits.png"),
            ),
            (folder / "exits.png",),
            seconds=5,
            always=True,
        ),
    ]
    # A step that ran makes all later ones run. The picture is quick, and its table should always be
    # printed.
    return [
        replace(step, needs=tuple(earlier.name for earlier in steps[:number]))
        for number, step in enumerate(steps)
    ]


def run_all(steps: Sequence[Step], folder: Path) -> int:
    """Run the unfinished steps; return 0, or the exit code of the first one that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        Runner(folder, len(steps)).run(steps)
    except StepError as error:
        print(f"\nThe demo stops at {error}", file=sys.stderr)
        return error.code
    return 0


def in_short(folder: Path) -> str:
    """Return the result in one sentence, from the evaluation files of both models."""
    nested, plain = (
        read_json_object(folder / name / "evaluation.json") for name in ("nested", "plain")
    )
    first, last = (str(exit_depths()[index]) for index in (0, -1))
    share = nested["exits"][first]["flops_per_token"] / nested["exits"][last]["flops_per_token"]

    def right(run: dict, depth: str) -> str:
        return f"{100 * next(iter(run['sets'].values()))[depth]['exact_match']:.0f} %"

    return (
        f"In short: {first} of {last} layers, {100 * share:.0f} % of the computing, answer "
        f"{right(nested, first)} of the reworded questions in the nested model\nand "
        f"{right(plain, first)} in the ordinary one; all {last} layers answer "
        f"{right(nested, last)} and {right(plain, last)}."
    )


def trained_question(folder: Path) -> tuple[str, str]:
    """Return a question of the training data, as it stands there, and its answer."""
    sample = first_record(folder / "data" / "train.jsonl")
    return sample["instruction"], sample["output"]


def use_commands(folder: Path) -> dict[str, tuple[str, ...]]:
    """Return the command for each use of the exported model; it runs in the project's folder as
    printed.
    """
    shown = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    python, model, data = (
        os.path.relpath(sys.executable, ROOT),
        str(shown / "nested_hf"),
        shown / "data",
    )
    ours = (python, "-m", "megatron_sorted")
    question, _ = trained_question(folder)
    return {
        "ask it": (*ours, "generate", model, "--prompt-template", "plain", "--prompt", question),
        "test it": (
            *ours,
            "evaluate",
            model,
            "--questions",
            str(data / "phrasing.jsonl"),
            "--num-questions",
            "200",
            "--output",
            str(shown / "evaluation"),
        ),
        "measure it": (
            *ours,
            "evaluate",
            model,
            "--data-path",
            str(data / "phrasing_text_document"),
            "--output",
            str(shown / "measured"),
        ),
        "serve it": (*ours, "serve", model, "--port", "8000"),
    }


def request_of(question: str) -> str:
    """Return what a client sends to the server: the question as a conversation of one turn."""
    return json.dumps(
        {"messages": [{"role": "user", "content": question}], "max_tokens": 32}, ensure_ascii=False
    )


def afterwards(folder: Path) -> str:
    """Return the closing lines: how to use the exported model."""
    question, answer = trained_question(folder)
    commands = "\n".join(
        f"  {purpose:<12} {shlex.join(command)}"
        for purpose, command in use_commands(folder).items()
    )
    return AFTERWARDS.format(
        commands=commands,
        answer=answer,
        model=(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder) / "nested_hf",
        request=shlex.quote(request_of(question)),
        python=os.path.relpath(sys.executable, ROOT),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code of the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        help="folder for all it writes (default: runs/demo or runs/demo_quick)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="next to no training: only shows that everything runs"
    )
    parser.add_argument("--fresh", action="store_true", help="do every step again")
    values = parser.parse_args(arguments)
    folder = (values.output or ROOT / "runs" / ("demo_quick" if values.quick else "demo")).resolve()
    if values.fresh:
        shutil.rmtree(folder / "finished_steps", ignore_errors=True)
    steps = demo_steps(folder, values.quick)
    minutes, depths = max(1, sum(step.seconds for step in steps) / 60), exit_depths()
    print(
        OPENING.format(
            minutes=minutes,
            folder=folder,
            depths=f"{', '.join(map(str, depths[:-1]))} and all {depths[-1]}",
        )
        + "\n"
    )
    try:
        code = run_all(steps, folder)
    except KeyboardInterrupt:
        print(
            "\nStopped. Run the same command again to continue at the unfinished step.",
            file=sys.stderr,
        )
        return 130
    if code == 0:
        summary = (
            "With --quick the models learn next to nothing: ignore the numbers."
            if values.quick
            else in_short(folder)
        )
        print(
            f"\n{HOW_TO_READ}\n\n{summary}\n\nThe picture: "
            f"{folder / 'exits.png'}\n\n{afterwards(folder)}"
        )
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    run_main(main)
