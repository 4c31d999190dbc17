"""The fault test: a run killed with SIGKILL 25 times ends bit for bit as the run that was never killed."""

import json
import time

from tests.system.conftest import run_script


def test_25_kills_change_nothing(tmp_path):
    """The moments differ from day to day; the seed is printed. The long form stands in docs/reliability.md."""
    seed = int(time.time()) % 10_000
    done = run_script(tmp_path, "tools/kill_test.py", "--kills", 25, "--steps", 60, "--seed", seed, "--folder", "work", "--result",
                      "result.json", seconds=1800)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, f"seed {seed}:\n{done.stdout}\n{done.stderr[-3000:]}"
    figures = json.loads((tmp_path / "result.json").read_text())
    assert figures["kills"] == 25 and figures["differences"] == []
    assert figures["kills of one rank"] + figures["kills of all ranks"] + figures["kills of all ranks and torchrun"] == 25
    assert figures["kills in the middle of a save"] >= 5
    assert figures["tensors_compared"] > 20 and figures["reports_compared"] >= 60
