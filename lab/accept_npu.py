"""What a host with Ascend NPUs must show on its first day: one line for each check, PASS or FAIL, with the figure.

    python -m lab.accept_npu                          on the host, with CANN's set_env.sh sourced; about 10 minutes
    python -m lab.accept_npu --only versions devices  some of the parts: versions, devices, steps, tests
    make accept-npu ON=simulation                       a trial without NPUs: the figures say nothing, the checks run

The steps are trained twice from the same checkpoint, on the CPU and on the NPUs, so that the golden losses are made by the same command.
Kernels that torch_npu would silently compute on the CPU are errors here.
"""

import argparse
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_sorted.command_line import ROOT, run_main, start_command
from megatron_sorted.platform.versions import NEWEST, is_newest, shown

if __name__ == "__main__":
    start_command()

SIMULATED = bool(os.environ.get("SIMULATED_NPUS"))
NO_FALLBACK = {"TORCH_NPU_FALLBACK_CPU_DISABLE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
MODEL = [
    "--mock-data", "--vocab-size", 512, "--num-layers", 4, "--hidden-size", 128, "--num-attention-heads", 4, "--exit-layer-nums", 1, 2, 3,
    "--seq-length", 64, "--micro-batch-size", 2, "--global-batch-size", 8, "--lr", 1e-3, "--lr-decay-style", "constant", "--seed", 5,
    "--log-interval", 1, "--eval-interval", "none"]  # fmt: skip
Line = tuple[str, bool, str]


def run(words: list, processes: int = 0, **environment: str) -> subprocess.CompletedProcess:
    """Return a finished program of the project; with ``processes``, started by torchrun."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if processes
        else []
    )
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    everything = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        **NO_FALLBACK,
        "PYTHONPATH": paths,
        **environment,
    }
    command = [sys.executable, *launcher, *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, env=everything, text=True, capture_output=True, check=False
    )


def last_words(done: subprocess.CompletedProcess) -> str:
    """Return the end of what a program that failed said."""
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return " | ".join(line.strip() for line in said[-3:])[-400:]


def versions(options: argparse.Namespace) -> Iterator[Line]:
    """Yield which software is there, and whether it fits together."""
    found = {}
    for name in ("torch", "torch_npu", "megatron-core", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    fits = found["torch"].split("+")[0] == found["torch_npu"].split(".post")[0] != "missing"
    yield "torch and torch_npu", fits, f"{found['torch']} and {found['torch_npu']}"
    yield (
        "megatron-core",
        is_newest(found["megatron-core"]),
        f"{found['megatron-core']} (tested: {shown(NEWEST)})",
    )
    loads = run(
        [
            "-c",
            "from megatron_sorted.platform.npu.start import load_torch_npu; load_torch_npu(); import torch; "
            "print(torch.version.cann, torch.npu.device_count())",
        ]
    )
    figure = (
        last_words(loads)
        if loads.returncode
        else f"CANN and number of NPUs: {loads.stdout.splitlines()[-1]}"
    )
    yield "torch_npu loads and sees NPUs", loads.returncode == 0, figure


def devices(options: argparse.Namespace) -> Iterator[Line]:
    """Yield what one process on each NPU measured."""
    done = run(
        [
            ROOT / "lab" / "acceptance" / "devices.py",
            "--copy-gigabytes",
            0 if SIMULATED else options.copy_gigabytes,
            "--collective-gigabytes",
            0 if SIMULATED else options.collective_gigabytes,
            "--mebibytes",
            1 if SIMULATED else 256,
        ],
        options.processes,
    )
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            said = json.loads(line)
            yield said["check"], said["passed"], said["figure"]
    figure = last_words(done) if done.returncode else f"{options.processes} processes"
    yield "devices: every process ended well", done.returncode == 0, figure


def losses(path: Path) -> dict[int, list[float]]:
    """Return the losses of all exits by step, from a run's metrics, which say null of what is not finite."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        row["step"]: [
            math.nan if numbers["loss"] is None else numbers["loss"]
            for numbers in row["exits"].values()
        ]
        for row in rows
    }


def compared(
    got: dict[int, list[float]], expected: dict[int, list[float]], tolerance: float
) -> tuple[bool, str]:
    """Return whether all losses of all steps are within a relative ``tolerance``, and how far the furthest is; NaN never is."""
    if got.keys() != expected.keys() or any(
        len(got[step]) != len(expected[step]) for step in expected
    ):
        return (
            False,
            f"{len(got)} steps were reported, not the {len(expected)} of the CPU, or other exits",
        )
    differences = [
        abs(a - b) / b for step in expected for a, b in zip(got[step], expected[step], strict=True)
    ]
    worst = max(
        differences, key=lambda difference: math.inf if math.isnan(difference) else difference
    )
    return (
        worst <= tolerance,
        f"losses differ by up to {worst:.2e} (at most {tolerance:g}); nothing was computed on the CPU",
    )


def steps(options: argparse.Namespace) -> Iterator[Line]:
    """Yield how far losses on NPUs are from those of the CPU over the same steps, from the same weights."""
    entry = ROOT / "pretrain_sorted.py"
    with tempfile.TemporaryDirectory() as folder:
        start, golden = Path(folder, "start"), Path(folder, "golden.jsonl")
        first = run([entry, *MODEL, "--device", "cpu", "--train-iters", 1, "--save", start])
        last = ["--train-iters", options.steps, "--load", start, "--finetune"]
        reference = (
            run([entry, *MODEL, *last, "--device", "cpu", "--metrics-file", golden])
            if first.returncode == 0
            else first
        )
        figure = last_words(reference) if reference.returncode else f"{options.steps} steps"
        yield "golden losses on the CPU", reference.returncode == 0, figure
        if reference.returncode:
            return
        expected = losses(golden)
        for name, more, processes, tolerance in (
            ("fp32, one NPU", [], 1, 1e-3),
            (
                "fp32, tensor and pipeline parallel",
                [
                    "--tensor-model-parallel-size",
                    2,
                    "--sequence-parallel",
                    "--pipeline-model-parallel-size",
                    2,
                ],
                4,
                1e-3,
            ),
            ("bf16, one NPU", ["--bf16"], 1, 2e-2),
        ):
            if processes > options.processes:
                yield (
                    f"{options.steps} steps, {name}",
                    False,
                    f"needs {processes} NPUs, --processes is {options.processes}",
                )
                continue
            path = Path(folder, f"{processes} {len(more)}.jsonl")
            done = run(
                [entry, *MODEL, *last, *more, "--device", "npu", "--metrics-file", path], processes
            )
            if done.returncode:
                yield f"{options.steps} steps, {name}", False, last_words(done)
                continue
            yield f"{options.steps} steps, {name}", *compared(losses(path), expected, tolerance)


def tests(options: argparse.Namespace) -> Iterator[Line]:
    """Yield what the tests of kernels and layouts say on these devices."""
    for name in ("test_npu_kernels.py", "test_npu_layouts.py"):
        words = ["-m", "pytest", "-m", "not long", f"tests/npu/{name}"]
        done = run(words, NPU_TESTS_ON="simulation" if SIMULATED else "devices")
        yield (
            f"tests/npu/{name}",
            done.returncode == 0,
            done.stdout.strip().splitlines()[-1] if done.stdout.strip() else last_words(done),
        )


PARTS = {part.__name__: part for part in (versions, devices, steps, tests)}


def main() -> int:
    """Return 0 if every check passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), help="Which parts (default: all)."
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=4 if SIMULATED else 8,
        metavar="N",
        help="NPUs to use (default: %(default)s).",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=50,
        metavar="N",
        help="Steps that are compared (default: %(default)s).",
    )
    parser.add_argument(
        "--copy-gigabytes",
        type=float,
        default=5.0,
        metavar="GB",
        help="Least rate of copies (default: %(default)s GB/s).",
    )
    parser.add_argument(
        "--collective-gigabytes",
        type=float,
        default=5.0,
        metavar="GB",
        help="Least rate of collectives (default: %(default)s GB/s).",
    )
    options = parser.parse_args()
    if SIMULATED:
        print("simulated NPUs: rates are the host's and not judged", flush=True)
    failed = 0
    for part in options.only:
        for name, passed, figure in PARTS[part](options):
            failed += not passed
            print(f"{'PASS' if passed else 'FAIL'}  {name}: {figure}", flush=True)
    print(f"{failed} checks failed" if failed else "every check passed")
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
