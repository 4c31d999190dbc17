"""Test files under one megatron-core, counted."""

import re
import shlex
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path
from typing import Any

from lab.reliability.processes import environment
from megatron_sorted.installation import ROOT

TELL_SECONDS = 60
"""How often a running session tells how far it is."""
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


def split_tests(tests: str) -> tuple[list[str], list[str]]:
    """Return the files and folders in a command line of pytest, and its other options.

    >>> split_tests("tests/unit tests/ranks/test_fsdp.py -k 'dp2 and not own'")
    (['tests/unit', 'tests/ranks/test_fsdp.py'], ['-k', 'dp2 and not own'])
    """
    given = shlex.split(tests)
    places = [
        one for one in given if one.startswith("tests/") and (ROOT / one.split("::")[0]).exists()
    ]
    return places, [one for one in given if one not in places]


def count_results(report: Path) -> dict[str, dict[str, Any]]:
    """Return, by test file, how many tests passed, failed and did not run, from a JUnit report.

    ``names`` holds the failed tests, and ``reasons`` how many did not run for which reason.
    """
    files: dict[str, dict[str, Any]] = defaultdict(
        lambda: {PASSED: 0, FAILED: 0, NOT_RUN: 0, "names": [], "reasons": {}}
    )
    # pytest wrote the report a moment ago
    for case in ElementTree.parse(report).iter("testcase"):
        # a file that cannot be imported is a case without a class, whose name is the module
        module = case.get("classname") or case.get("name") or ""
        path = re.sub(r"(\.test_\w+).*", r"\1", module).replace(".", "/") + ".py"
        counts, kinds = files[path], {part.tag for part in case}
        if kinds & {"failure", "error"}:
            counts[FAILED] += 1
            counts["names"].append(case.get("name"))
        elif (skipped := case.find("skipped")) is not None:
            counts[NOT_RUN] += 1
            reason = (skipped.get("message") or "").strip()
            counts["reasons"][reason] = counts["reasons"].get(reason, 0) + 1
        else:
            counts[PASSED] += 1
    return dict(files)


def run_tests(
    python: Path, place: str, options: list[str], folder: Path, workers: int
) -> dict[str, Any]:
    """Return the counts of one session of pytest by file, its exit status and its seconds.

    The session's output goes to ``folder``; every row of the long tables is run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = place.replace("/", "_").removesuffix(".py")
    report, log = folder / f"{name}.xml", folder / f"{name}.log"
    report.unlink(missing_ok=True)
    command = [
        *(str(python), "-m", "pytest", "-rs", "-p", "no:cacheprovider", "-m", "not faults"),
        *("-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"),
        *("--continue-on-collection-errors", f"--junitxml={report}", place, *options),
    ]
    began, shown_share = time.monotonic(), ""
    with (
        open(log, "wb") as output,
        subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT
        ) as session,
    ):
        while session.returncode is None:
            try:
                session.wait(TELL_SECONDS)
            except subprocess.TimeoutExpired:
                shares = re.findall(r"\[ *\d+%\]", log.read_text(errors="replace"))
                if shares and shares[-1] != shown_share:
                    shown_share = shares[-1]
                    print(f"    {shown_share}", flush=True)
    if not report.is_file():
        end = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{place}: pytest wrote no report; the end of {log}:\n{end}")
    return {
        "files": count_results(report),
        "status": session.returncode,
        "seconds": round(time.monotonic() - began, 1),
    }


def totals(result: dict[str, Any]) -> dict[str, int]:
    """Return the sums of a session's counts."""
    return {
        kind: sum(counts[kind] for counts in result["files"].values())
        for kind in (PASSED, FAILED, NOT_RUN)
    }
