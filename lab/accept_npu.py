"""Check a host with Ascend NPUs: one line for each check, PASS or FAIL, with its figure.

    python -m lab.accept_npu                          on the host, with CANN's set_env.sh sourced;
                                                      about 10 minutes
    python -m lab.accept_npu --only versions devices  some parts: versions, devices, steps, tests
    make accept-npu ON=simulation                     without NPUs: tries the checks alone

The same steps are trained from the same checkpoint on the CPU and on the NPUs, so that the golden
losses come from the same command. Kernels that torch_npu would silently compute on the CPU are
errors here.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_sorted.command_line import run_main, start_command
from megatron_sorted.errors import PlatformError
from megatron_sorted.installation import ROOT
from megatron_sorted.platform.npu.adaptors import ADAPTORS
from megatron_sorted.platform.supported import MEGATRON_CORE_TESTED
from megatron_sorted.platform.transformer_engine import check_engine, installed_engine

if __name__ == "__main__":
    start_command()

from lab.reliability.processes import environment, torchrun

SIMULATED = bool(os.environ.get("SIMULATED_NPUS"))
NO_FALLBACK = {"TORCH_NPU_FALLBACK_CPU_DISABLE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
MODEL = [
    *("--mock-data", "--vocab-size", 512, "--num-layers", 4, "--hidden-size", 128),
    *("--num-attention-heads", 4, "--exit-layer-nums", 1, 2, 3, "--seq-length", 64),
    *("--micro-batch-size", 2, "--global-batch-size", 8, "--lr", 1e-3),
    *("--lr-decay-style", "constant", "--seed", 5, "--log-interval", 1, "--eval-interval", "none"),
]
Line = tuple[str, bool, str]


def run(arguments: list, processes: int = 0, **variables: str) -> subprocess.CompletedProcess:
    """Run a program of the project to its end; torchrun starts it if ``processes`` is not 0."""
    launcher = torchrun(processes) if processes else [sys.executable]
    return subprocess.run(
        [*launcher, *map(str, arguments)],
        cwd=ROOT,
        env={**environment(), **NO_FALLBACK, **variables},
        text=True,
        capture_output=True,
        check=False,
    )


def end_of_output(done: subprocess.CompletedProcess) -> str:
    """Return the end of what a failed program printed."""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return " | ".join(line.strip() for line in lines[-3:])[-400:]


def versions(options: argparse.Namespace) -> Iterator[Line]:
    """Yield the installed versions, and whether they fit together."""
    installed = dict.fromkeys(("torch", "torch_npu", "megatron-core"), "missing")
    for name in installed:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    torch, torch_npu, megatron = installed.values()
    fits = torch.split("+")[0] == torch_npu.split(".post")[0] != "missing"
    yield "torch and torch_npu", fits, f"{torch} and {torch_npu}"
    tested = ", ".join(MEGATRON_CORE_TESTED)
    yield "megatron-core", megatron in MEGATRON_CORE_TESTED, f"{megatron} (tested: {tested})"
    engine = installed_engine()
    allowed, figure = True, f"{engine.folder}, in a trial" if engine else "none, as it must be"
    try:
        check_engine(engine, "npu")
    except PlatformError as error:
        allowed, figure = False, str(error)
    yield "Transformer Engine", allowed, figure
    loads = run(
        [
            "-c",
            "from megatron_sorted.platform.npu.start import load_torch_npu; load_torch_npu();"
            " import torch; print(torch.version.cann, torch.npu.device_count())",
        ]
    )
    figure = (
        end_of_output(loads)
        if loads.returncode
        else f"CANN and number of NPUs: {loads.stdout.splitlines()[-1]}"
    )
    yield "torch_npu loads and sees NPUs", loads.returncode == 0, figure


def devices(options: argparse.Namespace) -> Iterator[Line]:
    """Yield the measurements of one process on each NPU."""
    copy, collective, mebibytes = (
        (0, 0, 1) if SIMULATED else (options.copy_gigabytes, options.collective_gigabytes, 256)
    )
    arguments = [
        *("-m", "lab.acceptance.devices", "--copy-gigabytes", copy),
        *("--collective-gigabytes", collective, "--mebibytes", mebibytes),
    ]
    done = run(arguments, options.processes)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            result = json.loads(line)
            yield result["check"], result["passed"], result["figure"]
    figure = end_of_output(done) if done.returncode else f"{options.processes} processes"
    yield "devices: every process succeeded", done.returncode == 0, figure


def losses(path: Path) -> dict[int, list[float]]:
    """Return {step: losses of all exits} from a run's metrics, where null stands for non-finite."""
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
    """Return whether all losses of all steps are within a relative ``tolerance``, and a figure.

    NaN is never within it.
    """
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
        f"losses differ by up to {worst:.2e} (at most {tolerance:g});"
        " nothing was computed on the CPU",
    )


def steps(options: argparse.Namespace) -> Iterator[Line]:
    """Yield the differences between losses on NPUs and on the CPU over the same steps."""
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
        figure = end_of_output(reference) if reference.returncode else f"{options.steps} steps"
        yield "golden losses on the CPU", reference.returncode == 0, figure
        if reference.returncode:
            return
        expected = losses(golden)
        parallel = [
            *("--tensor-model-parallel-size", 2, "--sequence-parallel"),
            *("--pipeline-model-parallel-size", 2),
        ]
        for name, more, processes, tolerance in (
            ("fp32, one NPU", [], 1, 1e-3),
            ("fp32, tensor and pipeline parallel", parallel, 4, 1e-3),
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
            on_npu = ["--device", "npu", "--npu-adaptor", options.adaptor]
            done = run([entry, *MODEL, *last, *more, *on_npu, "--metrics-file", path], processes)
            if done.returncode:
                yield f"{options.steps} steps, {name}", False, end_of_output(done)
                continue
            yield f"{options.steps} steps, {name}", *compared(losses(path), expected, tolerance)


def tests(options: argparse.Namespace) -> Iterator[Line]:
    """Yield the results of the tests of kernels and layouts on these devices."""
    for name in ("test_npu_kernels.py", "test_npu_layouts.py"):
        arguments = ["-m", "pytest", "-m", "not long", f"tests/npu/{name}"]
        done = run(arguments, NPU_TESTS_ON="simulation" if SIMULATED else "devices")
        yield (
            f"tests/npu/{name}",
            done.returncode == 0,
            done.stdout.strip().splitlines()[-1] if done.stdout.strip() else end_of_output(done),
        )


PARTS = {part.__name__: part for part in (versions, devices, steps, tests)}


def main() -> int:
    """Return 0 if every check passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), help="Parts to run (default: all)."
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
        help="Steps to compare (default: %(default)s).",
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
    parser.add_argument(
        "--adaptor",
        choices=("none", *ADAPTORS),
        default="none",
        help="Package that patches Megatron in the steps on NPUs (default: %(default)s).",
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
