"""Measures conversions between Hugging Face directories and checkpoints: time beside plain reading and writing, and peak memory.

    python -m lab.bench_convert             about 10 minutes on 2 idle CPU cores (17 on busy ones); 18 GB in --folder
    python -m lab.bench_convert --quick     tiny models: a trial of the measurement, its numbers mean nothing

Writes docs/benchmarks/convert.md with the numbers behind it as convert.json. The models are made here; the file system of --folder is part
of what is measured.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lab.benchmarks.convert_model import Shape, write_model
from lab.benchmarks.convert_page import write_convert_page
from lab.benchmarks.report import origin
from lab.benchmarks.run_facts import file_system_of
from lab.reliability.task import environment

SHAPES = {"22 layers": Shape(22), "44 layers": Shape(44)}
QUICK = {"2 layers": Shape(2, 128, 256, 1000), "4 layers": Shape(4, 128, 256, 1000)}
ROUNDS = {"22 layers": 3, "44 layers": 1}
"""The deeper model is there for its memory."""
LIMIT_SECONDS = 1800


def run_worker(verb: str, source: Path, target: Path, verify: bool = False) -> dict[str, Any]:
    """Return what one process measured, and the load of the machine before it (1-minute mean).

    Raises:
        RuntimeError: It failed; the message holds the end of its output.
    """
    shutil.rmtree(target, ignore_errors=True)
    job, load = target.with_name("job.json"), os.getloadavg()[0]
    job.write_text(
        json.dumps(
            {
                "verb": verb,
                "source": str(source),
                "target": str(target),
                "verify": verify,
                "result": str(target.with_name("result.json")),
            }
        ),
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "lab.benchmarks.convert_worker", str(job)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"{verb} of {source.name} ended with status {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
        )
    return {**json.loads(target.with_name("result.json").read_text(encoding="utf-8")), "load": load}


def measure(shape: Shape, folder: Path, rounds: int) -> dict[str, Any]:
    """Return the rounds of one model; the first is also verified."""
    model, checkpoint, back, plain = (
        folder / name for name in ("model", "checkpoint", "back", "plain")
    )
    write_model(model, shape)
    found: dict[str, Any] = {
        "bytes": shape.num_bytes,
        "largest_bytes": shape.largest_bytes,
        "rounds": [],
    }
    for number in range(rounds):
        one: dict[str, Any] = {}
        for verb, source, target in (("import", model, checkpoint), ("export", checkpoint, back)):
            work = {
                f"plain beside {verb}": ("plain", source, plain, False),
                verb: (verb, source, target, number == 0),
            }
            for name in sorted(work, reverse=bool(number % 2)):  # each begins every other time
                one[name] = run_worker(*work[name])
                seconds, load = one[name]["seconds"], one[name]["load"]
                verified = (
                    f" + {one[name]['verify_seconds']:.1f} s"
                    if "verify_seconds" in one[name]
                    else ""
                )
                print(
                    f"round {number + 1}, {name}: {seconds:.1f} s{verified}, load {load:.1f}",
                    file=sys.stderr,
                    flush=True,
                )
                shutil.rmtree(plain, ignore_errors=True)
        found["rounds"].append(one)
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    parser.add_argument(
        "--rounds",
        type=int,
        help="how often everything is measured (default 3, and once the deeper model)",
    )
    parser.add_argument(
        "--folder", type=Path, help="where to work (18 GB at most); by default a temporary folder"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("docs/benchmarks"), help="where the reports go"
    )
    options = parser.parse_args()
    start, before, models = time.monotonic(), os.getloadavg()[0], {}
    # before somebody goes on working here
    measured = origin("cpu", 1, bf16=False, packages=("torch", "transformers", "safetensors"))
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench_convert_", dir=options.folder) as temporary:
        disk = file_system_of(Path(temporary))
        for name, shape in (QUICK if options.quick else SHAPES).items():
            place = Path(temporary) / name.replace(" ", "_")
            place.mkdir()
            models[name] = measure(
                shape, place, 1 if options.quick else options.rounds or ROUNDS[name]
            )
            shutil.rmtree(place)
    loads = [
        run["load"] for model in models.values() for one in model["rounds"] for run in one.values()
    ]
    facts = {
        **measured,
        "file system": disk,
        "models": "LLaMA shapes of hidden size 2048, MLP 5632, 32 heads in 4 groups, vocabulary 32,000, untied, in files of 1 GB",
        "load of the machine": f"{before:.1f} before the first run, {min(loads):.1f} to {max(loads):.1f} before the others (1-minute mean; "
        "the runs themselves are in it)",
    }
    print(write_convert_page(models, options.output, facts))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    run_main(main)
