"""What the pages of all benchmarks share: options, the origin of the numbers, and the files."""

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_sorted.files import write_text_atomically
from megatron_sorted.platform.select import PLATFORMS, choose_platform
from megatron_sorted.reporting.markdown import commit, processor

PACKAGES = ("torch", "megatron-core")


def step_options(description: str) -> argparse.ArgumentParser:
    """Build a parser with the options that benchmarks of single steps share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=["auto", *PLATFORMS], default="auto", help="where to run"
    )
    parser.add_argument("--bf16", action="store_true", help="bfloat16 instead of fp32")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument(
        "--rounds",
        type=int,
        default=8,
        help="rounds of timing (eager exits are timed in the first only)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("docs/benchmarks"), help="where the page goes"
    )
    return parser


def step_page_name(name: str, options: argparse.Namespace) -> str:
    """Return the name of a page on single steps; devices other than the CPU and bf16 are in it."""
    device = choose_platform(options.device).name
    return name + ("" if device == "cpu" else f"_{device}") + ("_bf16" if options.bf16 else "")


def uses_cpu_seconds(options: argparse.Namespace) -> bool:
    """Return whether a step's time is CPU time of its process.

    It is on a CPU with one thread, where other programs share the cores.
    """
    return choose_platform(options.device).name == "cpu" and options.threads == 1


def machine(device_name: str, threads: int) -> str:
    """Return a description of the machine."""
    device = choose_platform(device_name)
    if device.name == "cpu":
        return f"{processor()}, {threads} thread(s) a process"
    import torch

    return torch.get_device_module(device.name).get_device_name()


def command_line() -> str:
    """Return the command that started this program, as a user types it."""
    return shlex.join(["python", "-m", f"lab.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def origin(
    device: str, threads: int, bf16: bool, packages: Sequence[str] = PACKAGES
) -> dict[str, str]:
    """Return date, commit, command, machine and versions of a measurement."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "command": command_line(),
        "device": choose_platform(device).name,
        "machine": machine(device, threads),
        "precision": "bf16" if bf16 else "fp32",
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }


def file_system_of(path: Path) -> str:
    """Return kind and device of the file system that holds ``path``, "unknown" without /proc."""
    mounts = Path("/proc/mounts")
    lines = [line.split() for line in mounts.read_text().splitlines()] if mounts.exists() else []
    holding = [
        (len(folder), f"{kind} on {device}")
        for device, folder, kind, *_ in lines
        if path.resolve().is_relative_to(folder)
    ]
    return max(holding, default=(0, "unknown"))[1]


def bullets(facts: dict[str, str]) -> list[str]:
    """Return facts as lines of a list."""
    return [f"- {name}: {value}" for name, value in facts.items()]


def verdict_lines(targets: dict[str, bool]) -> list[str]:
    """Return targets, and whether they hold, as lines of a list."""
    return [
        f"- {'holds' if holds else 'DOES NOT HOLD'}: {target}" for target, holds in targets.items()
    ]


def write_page(folder: Path, name: str, text: str, numbers: dict[str, Any]) -> str:
    """Write a page and its numbers, as JSON with one line for each key; return the page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / f"{name}.md", text)
    body = ",\n".join(
        f" {json.dumps(key)}: {json.dumps(value)}" for key, value in rounded(numbers).items()
    )
    write_text_atomically(folder / f"{name}.json", f"{{\n{body}\n}}\n")
    return text


def rounded(value: Any) -> Any:
    """Round every float in plain data to six decimals.

    More than microseconds is noise, and would be most of the file.

    >>> rounded({"seconds": [1.23456789, 2]})
    {'seconds': [1.234568, 2]}
    """
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return round(value, 6) if isinstance(value, float) else value
