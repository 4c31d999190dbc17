"""Measure conversions between Hugging Face directories and checkpoints: time and peak memory.

    python -m lab.bench_convert             about 10 minutes on 2 idle CPU cores (17 on busy ones)
    python -m lab.bench_convert --quick     tiny models: tries the measurement, no useful numbers

Times are compared with plain reading and writing. Writes docs/benchmarks/convert.md with the
numbers behind it as convert.json. The models are made here; the file system of --folder is part of
what is measured, and needs 18 GB.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lab.benchmarks.convert_model import Shape, write_model
from lab.benchmarks.convert_page import write_convert_page
from lab.benchmarks.jobs import run_job
from lab.benchmarks.pages import file_system_of, origin

SHAPES = {"22 layers": Shape(22), "44 layers": Shape(44)}
QUICK = {"2 layers": Shape(2, 128, 256, 1000), "4 layers": Shape(4, 128, 256, 1000)}
ROUNDS = {"22 layers": 3, "44 layers": 1}
"""Rounds of each model; the deeper one is there for its memory."""


def run_worker(verb: str, source: Path, target: Path, verify: bool = False) -> dict[str, Any]:
    """Return what one process measured, and the load of the machine before it (1-minute mean).

    Raises:
        RuntimeError: It failed; the message holds the end of its output.
    """
    shutil.rmtree(target, ignore_errors=True)
    load = os.getloadavg()[0]
    job = {"verb": verb, "source": str(source), "target": str(target), "verify": verify}
    job["name"] = f"{verb} of {source.name}"
    [numbers] = run_job("lab.benchmarks.convert_worker", job, target.parent)
    return {**numbers, "load": load}


def measure(shape: Shape, folder: Path, rounds: int) -> dict[str, Any]:
    """Return the rounds of one model; its conversions of the first round are also verified."""
    model, checkpoint, back, plain = (
        folder / name for name in ("model", "checkpoint", "back", "plain")
    )
    write_model(model, shape)
    numbers: dict[str, Any] = {
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
            for name in sorted(work, reverse=bool(number % 2)):  # they take turns in being first
                one[name] = run_worker(*work[name])
                seconds, load = one[name]["seconds"], one[name]["load"]
                print(
                    f"round {number + 1}, {name}: {seconds:.1f} s, load {load:.1f}",
                    file=sys.stderr,
                    flush=True,
                )
                shutil.rmtree(plain, ignore_errors=True)
        numbers["rounds"].append(one)
    return numbers


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    parser.add_argument(
        "--rounds", type=int, help="rounds of every model (default: 3, and 1 of the deeper model)"
    )
    parser.add_argument(
        "--folder", type=Path, help="where to work (18 GB at most); by default a temporary folder"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("docs/benchmarks"), help="where the reports go"
    )
    options = parser.parse_args()
    start, before, models = time.monotonic(), os.getloadavg()[0], {}
    # The commit is taken first, because files may change while this runs.
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
        "models": "LLaMA shapes of hidden size 2048, MLP 5632, 32 heads in 4 groups,"
        " vocabulary 32,000, untied, in files of 1 GB",
        "load of the machine": f"{before:.1f} before the first run, {min(loads):.1f} to"
        f" {max(loads):.1f} before the others (1-minute mean; the runs themselves are in it)",
    }
    print(write_convert_page(models, options.output, facts))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    run_main(main)
