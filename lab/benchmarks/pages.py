"""Options of the benchmarks of single steps, and how every benchmark writes its page and its numbers."""

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_sorted.files import write_text_atomically
from megatron_sorted.platform.select import PLATFORMS, choose_platform


def step_options(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that benchmarks of single steps share."""
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
    """Return the name of a page on single steps, which says what it was measured on."""
    device = choose_platform(options.device).name
    return name + ("" if device == "cpu" else f"_{device}") + ("_bf16" if options.bf16 else "")


def bullets(facts: dict[str, str]) -> list[str]:
    """Return facts as lines of a list."""
    return [f"- {name}: {value}" for name, value in facts.items()]


def held(targets: dict[str, bool]) -> list[str]:
    """Return targets, and whether they hold, as lines of a list."""
    return [
        f"- {'holds' if holds else 'DOES NOT HOLD'}: {target}" for target, holds in targets.items()
    ]


def write_page(folder: Path, name: str, text: str, numbers: dict[str, Any]) -> str:
    """Return the page, after writing it and its numbers, as JSON with one line for each key."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / f"{name}.md", text)
    body = ",\n".join(
        f" {json.dumps(key)}: {json.dumps(value)}" for key, value in rounded(numbers).items()
    )
    write_text_atomically(folder / f"{name}.json", f"{{\n{body}\n}}\n")
    return text


def rounded(value: Any) -> Any:
    """Return plain data with every float to the microsecond: more is noise, and would be most of the file."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return round(value, 6) if isinstance(value, float) else value
