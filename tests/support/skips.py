"""A pytest plugin: with ``--no-skips`` a skipped test fails, unless ``.ci/allowed_skips`` lists it.

Without the option a skip only says what is missing. CI gives it, so that a missing program cannot
hide the tests that need it.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

LIST = ".ci/allowed_skips"  # below the root directory


class AllowedSkip(NamedTuple):
    """A line of the list.

    Attributes:
        tests: Test id, in which ``*`` stands for any text.
        reason: Words that the skip's own reason must contain.
    """

    tests: str
    reason: str

    def covers(self, test: str, reason: str) -> bool:
        """Return whether ``test`` may be skipped for ``reason``."""
        pattern = ".*".join(map(re.escape, self.tests.split("*")))
        return re.fullmatch(pattern, test) is not None and self.reason in reason


def read_list(path: Path) -> tuple[AllowedSkip, ...]:
    """Return the lines ``TEST-ID: REASON`` of a list; ``#`` starts a comment line.

    Raises:
        UsageError: A line has no test id or no reason.
    """
    listed = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        tests, _, reason = line.partition(": ")
        if not tests.strip() or not reason.strip():
            raise pytest.UsageError(f"{path}, line {number}: {line!r} is not TEST-ID: REASON")
        listed.append(AllowedSkip(tests.strip(), reason.strip()))
    return tuple(listed)


class NoSkips:
    """Turns the report of a skip that is not allowed into that of a failure."""

    def __init__(self, allowed: Sequence[AllowedSkip]):
        self.allowed = allowed

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        """Judge a test's report."""
        report = yield
        self._judge(report)
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self) -> Iterator[None]:
        """Judge the report of a file, which ``importorskip`` may skip as a whole."""
        report = yield
        self._judge(report)
        return report

    def _judge(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        where = report.longrepr  # (path, line, "Skipped: reason")
        reason = str(where[2] if isinstance(where, tuple) else where).removeprefix("Skipped: ")
        if not any(skip.covers(report.nodeid, reason) for skip in self.allowed):
            report.outcome = "failed"
            report.longrepr = (
                f"skipped, but --no-skips allows only the skips of {LIST}: {reason}\n"
                "Install what is missing, as .ci/run does, or list the test there with its reason."
            )


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--no-skips``."""
    parser.addoption(
        "--no-skips",
        action="store_true",
        help=f"fail where a test is skipped, unless {LIST} lists it",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Judge skips where the option is given."""
    if config.getoption("no_skips"):
        config.pluginmanager.register(NoSkips(read_list(config.rootpath / LIST)))
