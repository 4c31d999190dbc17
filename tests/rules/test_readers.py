"""Bytes from outside are read in megatron_sorted/reading/ alone, where their cost is bounded."""

import ast
import re

import pytest

from tests.rules.sources import name_of, program_files

OWN = "written by this project's own processes, in the same run"
MACHINE = "facts of the machine: /proc, its mounts, its installed packages, what its programs print"
OWN_TEXT = "the first line of a docstring, of a message or of a page of ours"
JSON_LEFT = {
    "megatron_sorted/monitoring/wandb_(writer|process).py": OWN,
    "megatron_sorted/training/watch/watchdog.py": OWN,
    "megatron_sorted/parallel/rendezvous.py": OWN,
    "megatron_sorted/doctor/network/rendezvous.py": OWN,
    "megatron_sorted/doctor/probes.py": OWN,
    "lab/accept_npu.py": OWN,
    "lab/benchmarks/.*": OWN,
    "lab/contests/rounds.py": OWN,
    "lab/results/experiments.py": OWN,
    "megatron_sorted/doctor/packages.py": MACHINE,
    "megatron_sorted/doctor/disks.py": MACHINE,
    "megatron_sorted/conversion/hugging_face/nested_exits.py": "is copied into exports, by itself",
}
LINES_LEFT = {
    "megatron_sorted/platform/cpu.py": MACHINE,
    "megatron_sorted/decoding/cache/capacity.py": MACHINE,
    "megatron_sorted/decoding/native/(compiler|cpu|library_cache).py": MACHINE,
    "megatron_sorted/doctor/.*": MACHINE,
    "lab/benchmarks/.*": MACHINE,
    "megatron_sorted/decoding/tuning/tune.py": MACHINE,
    "megatron_sorted/reporting/markdown.py": MACHINE,
    "lab/serving/(contenders|public_clients).py": MACHINE,
    "lab/accept_npu.py": OWN,
    "lab/results/steps.py": OWN,
    "lab/results/page.py": OWN_TEXT,
    "lab/kill_test.py": OWN_TEXT,
    "lab/acceptance/devices.py": OWN_TEXT,
    "megatron_sorted/settings/flags.py": OWN_TEXT,
    "megatron_sorted/checkpoint/(sharding/sharded|plain_objects).py": OWN_TEXT,
}
"""Files that may read JSON, or split lines, with Python's own functions -> reason."""

READS = ("load", "loads", "safe_load", "full_load")


def calls(source: str) -> set[str]:
    """Return "json", "lines" and "yaml" for the readers of Python that a source calls."""
    readers = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("json", "yaml"):
            readers |= {node.module for name in node.names if name.name in READS}
        if not isinstance(node, ast.Attribute):
            continue
        if (
            isinstance(node.value, ast.Name)
            and node.value.id in ("json", "yaml")
            and node.attr in READS
        ):
            readers.add(node.value.id)
        if node.attr == "splitlines":
            readers.add("lines")
    return readers


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import json\nx = json.loads(y)", {"json"}),
        ("from json import load", {"json"}),
        ("x.splitlines()", {"lines"}),
        ("json.dumps(x)", set()),
        ("rows = map(json.loads, lines)", {"json"}),
        ("yaml.safe_load(x)", {"yaml"}),
        ("map(str.splitlines, x)", {"lines"}),
    ],
)
def test_calls_are_reported(source, expected):
    assert calls(source) == expected


@pytest.mark.parametrize(
    ("kind", "left"), [("json", JSON_LEFT), ("lines", LINES_LEFT), ("yaml", {})]
)
def test_outside_bytes_are_read_in_one_place(kind, left):
    using = {
        name_of(path) for path in program_files() if kind in calls(path.read_text(encoding="utf-8"))
    }
    using -= {name for name in using if name.startswith("megatron_sorted/reading/")}
    unlisted = {name for name in using if not any(re.fullmatch(pattern, name) for pattern in left)}
    assert not unlisted, (
        "use megatron_sorted.reading: parse_json, read_json, read_records, split_lines;"
        " or settings.yaml_file"
    )
    unused = [pattern for pattern in left if not any(re.fullmatch(pattern, name) for name in using)]
    assert not unused, "delete them here"
