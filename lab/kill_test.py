"""Kill a training run at random moments, and prove that it ends like one that is never killed.

    python -m lab.kill_test --kills 25                 about 5 minutes on 2 CPU cores
    python -m lab.kill_test --kills 200 --steps 420    the long form, see docs/reliability.md

There are two torchrun jobs of the same settings. One is undisturbed, the other gets SIGKILL: to one
rank, to all ranks, or to all ranks and torchrun, during steps and in the middle of saves. What died
is started again: by torchrun itself (--max-restarts) or with the same command. In the end every
tensor of the last checkpoints, weights and optimizer state, every reported number and the checksum
of the data of every step must be equal, bit for bit.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from lab.reliability.compare import differing_reports, differing_tensors
from lab.reliability.killer import Killer
from lab.reliability.task import RunningJob, write_task
from megatron_sorted.files import write_text_atomically
from megatron_sorted.platform.processes import silence_library_warnings


def main() -> int:
    """Return 0 if both runs ended with equal states and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kills", type=int, default=25, metavar="N", help="Number of kills (default: %(default)s)."
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=60,
        metavar="N",
        help="Steps of the run (default: %(default)s).",
    )
    parser.add_argument(
        "--processes", type=int, default=2, metavar="N", help="Ranks (default: %(default)s)."
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="Seed of the moments and victims (default: %(default)s).",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="Working folder; by default a temporary one, removed afterwards.",
    )
    parser.add_argument("--result", type=Path, help="JSON file for the figures.")
    parser.add_argument("settings", nargs="*", help="More settings of both runs, after --.")
    given = parser.parse_args()
    silence_library_warnings()
    with tempfile.TemporaryDirectory(prefix="kill_test_") as temporary:
        folder = given.folder or Path(temporary)
        return kill_test(folder, given)


def kill_test(folder: Path, given: argparse.Namespace) -> int:
    """Run both jobs in ``folder``; return 0 if they end with equal states and reports."""
    began = time.monotonic()
    write_task(folder)
    print(f"1 of 3: {given.steps} steps on {given.processes} processes, undisturbed", flush=True)
    peace = RunningJob(folder, "peace", given.steps, given.processes, given.settings)
    peace.wait_until_finished(seconds=60 + 5 * given.steps)
    print(f"2 of 3: the same under {given.kills} kills", flush=True)
    killer = Killer(
        folder, given.steps, given.processes, given.kills, given.settings, random.Random(given.seed)
    )
    killer.run()
    print("3 of 3: comparison", flush=True)
    tensors, different = differing_tensors(folder / "peace", folder / "killed", given.steps)
    lines, unlike = differing_reports(
        folder / "peace" / "metrics.jsonl", folder / "killed" / "metrics.jsonl", given.steps
    )
    figures = {
        **killer.figures(),
        "tensors_compared": tensors,
        "reports_compared": lines,
        "differences": different + unlike,
        "seconds": round(time.monotonic() - began),
    }
    for name, value in figures.items():
        print(
            f"  {name.replace('_', ' '):42} {value if not isinstance(value, list) else len(value)}"
        )
    for difference in (different + unlike)[:10]:
        print(f"  differs: {difference}")
    if given.result:
        write_text_atomically(given.result, json.dumps(figures, indent=1) + "\n")
    failed = bool(different or unlike or not tensors)
    print(
        "FAILED: the runs differ"
        if failed
        else "equal: weights, optimizer state, losses and data order, bit for bit"
    )
    return int(failed)


if __name__ == "__main__":
    run_main(main)
