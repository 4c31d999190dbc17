"""The time of a test run by folder, its slowest tests, and numbers of tests and assertions.

Prints a warning, and never fails, where a run took longer than is aimed at: machines are shared.
"""

import ast
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support.preloaded.session import spent_seconds

SLOWEST = 10
AIM_SECONDS = {
    "tests/rules": 20,
    "tests/unit": 120,
    "tests/ranks": 330,
    "tests/system": 330,
    "tests/faults": 60,
    "tests/launch": 60,
}
"""Target CPU seconds of each folder's everyday tests: a quarter of an hour on 2 cores in all."""
BEGAN = pytest.StashKey[tuple[float, float]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None):
    """Measure a test with its fixtures; its report carries the figures to the printing process."""
    item.stash[BEGAN] = time.monotonic(), spent_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Put the wall and CPU seconds of a test on its last report."""
    report = yield
    if call.when == "teardown":
        wall, cpu = item.stash[BEGAN]
        report.user_properties.append(("seconds", (time.monotonic() - wall, spent_seconds() - cpu)))
    return report


def num_assertions(files: Iterable[Path]) -> int:
    """Return how many statements in these files assert something, `pytest.raises` included."""
    count = 0
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            count += isinstance(node, ast.Assert) or (
                isinstance(node, ast.Attribute) and node.attr == "raises"
            )
    return count


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Print the table."""
    reports = [
        report
        for key in ("", "passed", "failed", "error")
        for report in terminalreporter.stats.get(key, ())
    ]
    seconds = {
        report.nodeid: value
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "seconds"
    }
    if len(seconds) <= SLOWEST:
        return
    folders = defaultdict(list)
    for nodeid, spent in seconds.items():
        folders["/".join(nodeid.split("::")[0].split("/")[:2])].append(spent)
    write = terminalreporter.write_line
    write(f"{'folder':16} {'tests':>6} {'wall s':>8} {'CPU s':>8}")
    for folder, spent in sorted(folders.items()):
        wall, cpu = (sum(column) for column in zip(*spent, strict=True))
        late = (
            f"  warning: aimed at {AIM_SECONDS[folder]} CPU s"
            if cpu > AIM_SECONDS.get(folder, cpu)
            else ""
        )
        write(f"{folder:16} {len(spent):6} {wall:8.0f} {cpu:8.0f}{late}")
    files = {config.rootpath / nodeid.split("::")[0] for nodeid in seconds}
    write(
        f"{len(seconds)} tests in {len(files)} files with {num_assertions(files)} assertions; "
        "the slowest, in seconds:"
    )
    for nodeid, (wall, cpu) in sorted(seconds.items(), key=lambda pair: -pair[1][0])[:SLOWEST]:
        write(f"  {wall:6.1f} wall {cpu:6.1f} CPU  {nodeid}")
