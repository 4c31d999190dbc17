"""Compare a training step with exits with megatron-core's own model: time, memory, FLOP bound.

Writes docs/benchmarks/step_<shape>.md and .json. Each case runs in processes of its own. Times are
taken in turns, one step of each case in a round, because only ratios are meaningful on a machine
that other programs use too.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import time

from lab.benchmarks.cases import EXIT_LAYERS, SHAPES, all_cases
from lab.benchmarks.measure import measure_shape
from lab.benchmarks.pages import step_options
from lab.benchmarks.report import write_report


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = step_options(__doc__)
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="which shapes"
    )
    parser.add_argument("--quick", action="store_true", help="0 and 7 exits only, one full round")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    options = parse_arguments()
    cases = all_cases([0, 7] if options.quick else sorted(EXIT_LAYERS))
    start = time.monotonic()
    for shape in options.shapes:
        result = measure_shape(shape, cases, options)
        print(write_report(shape, result, options))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    run_main(main)
