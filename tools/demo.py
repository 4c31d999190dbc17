"""Trains a tiny nested model and an ordinary one on true facts, and shows what each sub-model of both can do.

    python tools/demo.py            about 5 minutes on 2 CPU cores, nothing is downloaded
    python tools/demo.py --quick    the same steps with next to no training, to see whether everything runs

Steps that are finished are not done again; --fresh starts anew.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "examples" / "demo_nested.yaml"

# Small enough that a model of 2 million parameters learns them in a minute, and too many to be learned one phrasing at a time.
QUESTIONS = ("--asking-locales", "en", "--kinds", "territory", "language", "month", "weekday", "--max-name-length", "12",
             "--locales", "de", "fr", "es", "it", "fi", "tr", "pl", "sv", "pt", "nl", "cs", "hu", "ru", "el", "ja", "zh")
NEXT = """What to try next
  your own data      python tools/prepare_data.py --help
  other exits        python tools/demo.py --fresh after editing examples/demo_nested.yaml (exit-layer-nums)
  more questions     python tools/make_cldr_questions.py --output runs/questions --num-samples 200000
  larger models      examples/llama2_7b_8gpu.yaml, examples/llama2_13b_soft.yaml"""

HOW_TO_READ = """How to read it: `nested` was trained at every exit, `plain` only at the last, equally long. The phrasing set
asks trained facts in words that were never trained; the unseen set asks facts that were never trained, so its exact match
is what guessing earns."""


@dataclass(frozen=True)
class Step:
    """One command of the demo, what it is for, and the files that show that it is finished."""

    name: str
    purpose: str
    seconds: int
    command: tuple[str, ...]
    makes: tuple[Path, ...]
    clears: tuple[Path, ...] = field(default=())


def demo_steps(folder: Path, quick: bool) -> list[Step]:
    """Returns the steps in order; every path they write is inside ``folder``, and commands run in the project's folder."""
    folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder  # commands that can be read and copied
    python, data = sys.executable, folder / "data"
    tokenizer = data / "train_tokenizer.model"
    facts, questions, vocabulary = ("40", "40", "600") if quick else ("1200", "600", "3072")
    few_steps = ("--train-iters", "6", "--lr-warmup-iters", "2") if quick else ()

    def prepare(name: str) -> Step:
        source = ("--train-tokenizer", vocabulary) if name == "train" else ("--tokenizer-model", str(tokenizer))
        command = (python, "tools/prepare_data.py", "--input", str(data / f"{name}.jsonl"), "--output-prefix", str(data / name),
                   "--seq-length", "128", "--workers", "2", "--overwrite", *source)
        makes = tuple(data / f"{name}_text_document{ending}" for ending in (".bin", ".idx"))
        purpose = {"train": "Train a tokenizer on the questions and turn them into token files",
                   "phrasing": "The same tokenizer for trained facts in phrasings that are never trained",
                   "unseen": "... and for facts that are never trained: what guessing earns"}[name]
        return Step(f"prepare-{name}", purpose, 10 if name == "train" else 3, command, makes + ((tokenizer,) if name == "train" else ()))

    def train(name: str, purpose: str, *flags: str) -> Step:
        save = folder / name
        valid = [str(data / f"{kind}_text_document") for kind in ("phrasing", "unseen")]
        command = (python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "pretrain_sorted.py",
                   "--config", str(CONFIG.relative_to(ROOT)), "--data-path", str(data / "train_text_document"),
                   "--valid-data-path", *valid, "--tokenizer-model", str(tokenizer), "--save", str(save), *few_steps, *flags)
        return Step(f"train-{name}", purpose, 20 if quick else 100, command, (save / "evaluation.json",), (save,))

    return [
        Step("questions", "Write questions about names in 16 languages, with true answers from Unicode CLDR", 5,
             (python, "tools/make_cldr_questions.py", "--output", str(data), *QUESTIONS, "--max-facts", facts,
              "--num-eval-samples", questions),
             tuple(data / f"{name}.jsonl" for name in ("train", "phrasing", "unseen"))),
        *map(prepare, ("train", "phrasing", "unseen")),
        train("nested", "Train 8 layers so that the first 2, 4 and 6 are models as well: 2 processes, 4 layers each"),
        train("plain", "Train an ordinary model equally long: no loss at exits 2, 4 and 6", "--exit-layer-weight", "0", "0", "0"),
        Step("picture", "Compare every sub-model of both", 5,
             (python, "tools/plot_exits.py", str(folder / "nested" / "evaluation.json"), str(folder / "plain" / "evaluation.json"),
              "--output", str(folder / "exits.png")), (folder / "exits.png",)),
    ]


def is_finished(step: Step, record: Path) -> bool:
    """Returns whether this very command has ended well before, on the same example file, and its files are still there."""
    return record.is_file() and record.read_text(encoding="utf-8") == _fingerprint(step) and not _missing(step)


def _missing(step: Step) -> list[str]:
    """Returns the files a step should have made and that are not there."""
    return [str(path) for path in step.makes if not (ROOT / path).exists()]


def _fingerprint(step: Step) -> str:
    """Returns what a step's result depends on: its command and, for training, the text of the example."""
    return json.dumps([step.command, CONFIG.read_text(encoding="utf-8") if "--config" in step.command else ""])


def run_step(step: Step, title: str) -> int:
    """Returns the exit code of the step's command, whose output goes straight to the terminal."""
    print(f"\n== {title}: {step.purpose} (about {step.seconds} s)\n   {shlex.join(step.command)}\n", flush=True)
    for path in step.clears:
        shutil.rmtree(ROOT / path, ignore_errors=True)
    began = time.monotonic()
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # One thread per process: two processes that each take every core slow each other down several times.
    code = subprocess.run(step.command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}, check=False).returncode
    print(f"\n   {'done' if code == 0 else 'FAILED'} after {time.monotonic() - began:.0f} s", flush=True)
    return code


def run_all(steps: Sequence[Step], records: Path) -> int:
    """Returns 0, or the exit code of the first step that failed. After a step that had to run, all later ones run too."""
    records.mkdir(parents=True, exist_ok=True)
    is_stale = False
    for number, step in enumerate(steps, 1):
        title, record = f"step {number} of {len(steps)}", records / step.name
        is_last = number == len(steps)  # quick, and its table should be seen every time
        if not is_stale and not is_last and is_finished(step, record):
            print(f"== {title}: {step.purpose}: finished before, skipped (--fresh does it again)", flush=True)
            continue
        is_stale = True
        record.unlink(missing_ok=True)
        if (code := run_step(step, title)) != 0:
            print(f"\nThe demo stops at {title} ({step.name}), exit code {code}. The message above says why; "
                  "the same command again goes on from this step.", file=sys.stderr)
            return code
        if missing := _missing(step):
            print(f"\nThe demo stops: {step.name} ended well but did not write {', '.join(missing)}.", file=sys.stderr)
            return 1
        record.write_text(_fingerprint(step), encoding="utf-8")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="folder for all it writes (default: runs/demo or runs/demo_quick)")
    parser.add_argument("--quick", action="store_true", help="next to no training: only shows that everything runs")
    parser.add_argument("--fresh", action="store_true", help="do every step again")
    values = parser.parse_args(arguments)
    folder = (values.output or ROOT / "runs" / ("demo_quick" if values.quick else "demo")).resolve()
    records = folder / "finished_steps"
    if values.fresh:
        shutil.rmtree(records, ignore_errors=True)
    steps = demo_steps(folder, values.quick)
    minutes = sum(step.seconds for step in steps) / 60
    print(f"This demo trains two tiny models on 2 CPU processes, about {minutes:.0f} minutes in all, into {folder}.")
    try:
        code = run_all(steps, records)
    except KeyboardInterrupt:
        print("\nStopped. The same command again goes on from the unfinished step.", file=sys.stderr)
        return 130
    if code == 0:
        print(f"\nThe picture: {folder / 'exits.png'}\n\n{HOW_TO_READ}\n\n{NEXT}")
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
