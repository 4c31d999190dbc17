"""The fault test: a run killed with SIGKILL, in the long form 25 times, ends bit for bit as the run that was never killed."""

import json
import time

import pytest

from tests.support.layouts import thinned
from tests.system.conftest import run_script


@pytest.mark.parametrize("kills", thinned([6, 25], 6))
def test_kills_change_nothing(tmp_path, kills):
    """The moments differ from day to day; the seed is printed. The long form stands in docs/reliability.md."""
    seed = int(time.time()) % 10_000
    done = run_script(tmp_path, "tools/kill_test.py", "--kills", kills, "--steps", 60, "--seed", seed, "--folder", "work", "--result",
                      "result.json", seconds=1800)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, f"seed {seed}:\n{done.stdout}\n{done.stderr[-3000:]}"
    figures = json.loads((tmp_path / "result.json").read_text())
    assert figures["kills"] == kills and figures["differences"] == []
    assert figures["kills of one rank"] + figures["kills of all ranks"] + figures["kills of all ranks and torchrun"] == kills
    assert figures["kills in the middle of a save"] >= (5 if kills == 25 else 0)  # of six all may fall between saves
    assert figures["tensors_compared"] > 20 and figures["reports_compared"] >= 60
