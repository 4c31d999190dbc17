"""The fault test: a run that is killed again and again ends bit for bit as an unbroken one."""

import json
import time

import pytest

from tests.support.commands import run_command
from tests.support.preloaded.session import stand_in


@pytest.mark.parametrize(
    ("kills", "steps"),
    [
        (9, 24),
        pytest.param(
            25, 60, marks=pytest.mark.long(reason="the same three kinds of kills, more often")
        ),
    ],
)
def test_kills_change_nothing(tmp_path, kills, steps):
    """Kill at moments that differ each time; the seed is printed.

    docs/reliability.md has the long form.
    """
    seed = int(time.time()) % 10_000
    done = run_command(
        "tools/kill_test.py",
        "--kills",
        kills,
        "--steps",
        steps,
        "--seed",
        seed,
        "--folder",
        "work",
        "--result",
        "result.json",
        seconds=1800,
        cwd=tmp_path,
        cold=True,
        PYTHON_EXEC=stand_in(),
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, f"seed {seed}:\n{done.stdout}\n{done.stderr[-3000:]}"
    figures = json.loads((tmp_path / "result.json").read_text())
    assert figures["kills"] == kills and figures["differences"] == []
    by_victim = [
        figures[f"kills of {victim}"]
        for victim in ("one rank", "all ranks", "all ranks and torchrun")
    ]
    assert sum(by_victim) == kills and min(by_victim) >= kills // 3
    assert figures["kills in the middle of a save"] >= (5 if kills > 20 else 1)
    assert figures["tensors_compared"] > 20 and figures["reports_compared"] >= steps
