"""Compares one training step with exits to megatron-core's own model: time, peak memory, and the bound that FLOPs set.

Writes docs/benchmarks/step_<shape>.md and .json. Each case runs in processes of its own; times are taken in turns, one step of
each case a round, because only ratios mean something on a machine that others use too.
"""

from megatron_sorted.command import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import sys
import time

from benchmark.cases import EXIT_LAYERS, VOCABULARY, all_cases
from benchmark.measure import measure_shape
from benchmark.report import write_report

from megatron_sorted.platform.select import PLATFORMS


def parse_arguments() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=sorted(VOCABULARY), default=sorted(VOCABULARY), help="which shapes")
    parser.add_argument("--device", choices=["auto", *PLATFORMS], default="auto", help="where to run")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 instead of fp32")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of timing (eager exits are timed in the first only)")
    parser.add_argument("--quick", action="store_true", help="0 and 7 exits only, one full round")
    parser.add_argument("--output", default="docs/benchmarks", help="where the reports go")
    return parser.parse_args()


def main() -> None:
    """Runs the benchmark."""
    options = parse_arguments()
    cases = all_cases([0, 7] if options.quick else sorted(EXIT_LAYERS))
    start = time.monotonic()
    for shape in options.shapes:
        result = measure_shape(shape, cases, options)
        print(write_report(shape, result, options, " ".join(["python", *sys.argv])))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    run_main(main)
