"""The order of test files, by which two workers seldom wait for each other.

Tests with more than two ranks run alone among those with ranks, so files of one folder alternate
with those of another. A worker that begins a long file last would leave the other one idle, so long
files come first.
"""

from collections import defaultdict

import pytest

LONG_SECONDS = {
    "tests/ranks/test_checkpoint.py": 200,
    "tests/ranks/test_layouts.py": 120,
    "tests/ranks/test_learned_rules.py": 80,
    "tests/system/test_stops.py": 110,
    "tests/system/test_kills.py": 60,
    "tests/system/test_round_trip.py": 80,
}
"""Approximate seconds of long files; other tests take about a second each."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files; the tests of one file stay together, in their order."""
    files = defaultdict(list)
    for item in items:
        files[item.nodeid.split("::")[0]].append(item)
    seconds = {name: LONG_SECONDS.get(name, len(tests)) for name, tests in files.items()}
    folders = defaultdict(list)
    for name in sorted(files, key=lambda name: -seconds[name]):
        folders[name.rsplit("/", 1)[0]].append(name)
    done = dict.fromkeys(folders, 0.0)
    ordered = []
    while folders:
        folder = min(folders, key=lambda name: (done[name], name))
        name = folders[folder].pop(0)
        done[folder] += seconds[name]
        ordered += files[name]
        if not folders[folder]:
            del folders[folder]
    items[:] = ordered
