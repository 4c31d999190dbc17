"""Run tests, checkpoints and a fine-tuning under every tested version of megatron-core.

    make test-versions                                  all of it: some hours on 2 cores
    python -m lab.megatron_versions --only checkpoints fine-tuning
    python -m lab.megatron_versions --tests "tests/ranks/test_layouts.py -k pp2" --only tests

Versions run one after the other, each in an environment of its own, and what is finished is not
repeated as long as no source has changed: the same command continues where it was stopped. Failed
tests are repeated. Writes docs/results/megatron_versions.md with the numbers behind it as JSON.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import sys
from pathlib import Path
from typing import Any

from lab.benchmarks.pages import origin
from lab.versions.checkpoints import run_checkpoints
from lab.versions.environment import python_with
from lab.versions.fine_tuning import run_fine_tuning
from lab.versions.page import write_results
from lab.versions.records import Records
from lab.versions.rows import FAILED, NOT_RUN, PASSED, run_tests, split_tests, totals
from megatron_sorted.errors import SettingsError
from megatron_sorted.installation import ROOT
from megatron_sorted.platform.supported import MEGATRON_CORE_TESTED

PARTS = ("checkpoints", "fine-tuning", "tests")
"""In the order in which they run, the short ones first."""


def read_arguments() -> argparse.Namespace:
    """Parse the command line.

    Raises:
        SettingsError: No test is named, or a version is not one of those that are tested.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (all)"
    )
    parser.add_argument(
        "--versions", nargs="+", default=list(MEGATRON_CORE_TESTED), help="versions (%(default)s)"
    )
    parser.add_argument(
        "--tests", default="", help="files, folders and options for pytest, as one word"
    )
    parser.add_argument("--workers", type=int, default=2, help="of pytest (%(default)s)")
    parser.add_argument(
        "--model",
        type=Path,
        help="Hugging Face directory with a tokenizer.model to fine-tune; by default one is trained"
        " here",
    )
    parser.add_argument("--text", type=Path, help="UTF-8 text of many documents to fine-tune on")
    parser.add_argument(
        "--separator", default="<|endoftext|>", help="text between two documents (%(default)s)"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=ROOT / ".venv-megatron",
        help="environments, runs and results (.venv-megatron)",
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "results", help="where the page goes"
    )
    values = parser.parse_args()
    if "tests" in values.only and not split_tests(values.tests)[0]:
        raise SettingsError(
            "--tests: names no file or folder of tests. Name some, or run `make test-versions`, "
            "which names those of MEGATRON_TESTS."
        )
    return values


def run_all_tests(
    pythons: dict[str, Path], options: argparse.Namespace, records: Records
) -> dict[str, dict[str, Any]]:
    """Return the sessions of all tests by version and place; one with failures is repeated."""
    places, pytest_options = split_tests(options.tests)
    sessions: dict[str, dict[str, Any]] = {version: {} for version in pythons}
    number = 0
    for version, python in pythons.items():
        for place in places:
            number += 1
            title = f"({number} of {len(pythons) * len(places)}) {version}, {place}"
            name = "/".join(["tests", *pytest_options, version, place.replace("/", "_")])
            result = records.get(name)
            if result is None or totals(result)[FAILED] or result["status"]:
                print(title, flush=True)
                logs = records.folder / "sessions" / version
                result = run_tests(python, place, pytest_options, logs, options.workers)
                records.put(name, result)
            counts = totals(result)
            shown = ", ".join(f"{counts[kind]} {kind}" for kind in (PASSED, FAILED, NOT_RUN))
            print(f"{title}: {shown}, {result['seconds']:.0f} s", flush=True)
            sessions[version][place] = result
    return sessions


def faults(part: str, result: Any) -> list[str]:
    """Return a line for everything in a part's result that is not as it should be."""
    if part == "tests":
        return [
            f"{version}, {place}: {totals(session)[FAILED]} failed, status {session['status']}"
            for version, sessions in result.items()
            for place, session in sessions.items()
            if totals(session)[FAILED] or session["status"]
        ]
    if part == "checkpoints":
        return [
            f"checkpoint of {pair['saved by']} continued under {pair['continued by']}, "
            f"{pair['layout']} layout: other weights or moments"
            for pair in result["pairs"]
            if not pair["equal"]
        ]
    (first, expected), *others = result["versions"].items()
    return [
        f"fine-tuning under {version}: other numbers than under {first}"
        for version, numbers in others
        if numbers != expected
    ]


def facts_of(options: argparse.Namespace) -> dict[str, str]:
    """Return date, commit, command and machine; model and text are named without their folders."""
    facts = origin("cpu", 1, bf16=False, packages=("torch", "transformers"))
    for path in filter(None, (options.model, options.text, options.folder, options.output)):
        facts["command"] = facts["command"].replace(str(path), path.name)
    python = ".".join(map(str, sys.version_info[:3]))
    return {**facts, "versions": f"{facts['versions']}, Python {python}"}


def main() -> int:
    """Run the parts, write the page after each, and return 1 if anything is not as it should be."""
    options = read_arguments()
    facts = facts_of(options)
    pythons = {
        version: python_with(version, options.folder / version) for version in options.versions
    }
    records = Records(options.folder)
    all_faults: list[str] = []
    for part in options.only:
        name = part
        if part == "checkpoints":
            result = run_checkpoints(pythons, options.folder, records)
        elif part == "fine-tuning":
            result = run_fine_tuning(
                pythons, options.folder, records, options.model, options.text, options.separator
            )
            name = f"{part} of {result['model'] or 'a model trained here'}"
        else:
            result = run_all_tests(pythons, options, records)
        print(write_results(options.output, name, facts, result), flush=True)
        all_faults += faults(part, result)
    for line in all_faults:
        print(f"FAILED: {line}")
    return 1 if all_faults else 0


if __name__ == "__main__":
    run_main(main)
