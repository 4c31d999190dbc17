"""Measure whole runs: what the loop does beside training, and what checkpoints cost.

    python -m lab.bench_run             about 8 minutes on 2 idle CPU cores
    python -m lab.bench_run --quick     tiny models: tries the measurement, no useful numbers

Writes docs/benchmarks/run_loop.md and run_checkpoint.md with the numbers behind them as .json.
Checkpoints are written to --folder: its file system is what is measured.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from lab.benchmarks.checkpoint_page import write_checkpoint_page
from lab.benchmarks.jobs import CaseResult, run_case
from lab.benchmarks.loop_page import write_loop_page
from lab.benchmarks.pages import file_system_of
from lab.benchmarks.run_cases import RunCase, checkpoint_cases, loop_cases
from lab.reliability.task import write_task

PARTS = ("loop", "checkpoint")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    parser.add_argument(
        "--folder", type=Path, help="where to work (4.5 GB at most); by default a temporary folder"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("docs/benchmarks"), help="where the reports go"
    )
    return parser.parse_args()


def _run_all(cases: list[RunCase], folder: Path) -> list[CaseResult]:
    results = []
    for number, case in enumerate(cases):
        print(f"{case.name} ...", end=" ", file=sys.stderr, flush=True)
        place = folder / f"{case.kind}_{number}"
        place.mkdir()
        results.append(run_case(case, place, folder))
        shutil.rmtree(place)
        print(f"{results[-1].seconds:.0f} s", file=sys.stderr, flush=True)
    return results


def main() -> None:
    """Run the benchmark."""
    options = parse_arguments()
    start = time.monotonic()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench_run_", dir=options.folder) as temporary:
        folder = Path(temporary)
        write_task(folder)
        if "loop" in options.parts:
            print(write_loop_page(_run_all(loop_cases(options.quick), folder), options.output))
        if "checkpoint" in options.parts:
            results = _run_all(checkpoint_cases(options.quick), folder)
            print(write_checkpoint_page(results, options.output, file_system_of(folder)))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    run_main(main)
