"""lab/posgen.py from nothing to a page, with next to no training, two times."""

import json

from lab.posgen_task.outcomes import NAMES
from lab.posgen_task.sequences import extend
from tests.support.commands import run_command


def test_a_quick_run_writes_a_page_and_does_nothing_twice(tmp_path):
    options = ("--quick", "--tasks", "cot", "--output", "out")
    done = run_command("lab/posgen.py", *options, cwd=tmp_path, seconds=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    again = run_command("lab/posgen.py", *options, cwd=tmp_path, seconds=600)
    assert again.returncode == 0 and "done after" not in again.stdout, again.stdout[-3000:]
    docs = tmp_path / "out" / "docs"
    page = (docs / "results" / "posgen.md").read_text()
    assert all(f"| {name} |" in page for name in NAMES) and "| open |" in page
    assert str(tmp_path) not in page.replace(str(tmp_path / "out"), "")
    assert (docs / "images" / "posgen.png").stat().st_size > 20_000
    rows = json.loads((docs / "results" / "posgen.json").read_text())
    assert [(row["name"], row["exit"]) for row in rows] == [
        (name, depth) for name in NAMES for depth in (1, 2)
    ]
    # all but the four given numbers of the 4 test sequences count, each once, at its position
    assert rows[0]["lasts"] == list(range(16, 257, 16))
    assert rows[0]["tokens"] == [4 * 12] + 15 * [4 * 16]
    tests = (tmp_path / "out" / "cot" / "data" / "test.jsonl").read_text().splitlines()
    for record in map(json.loads, tests):
        given = [int(word) for word in record["instruction"].split()]
        rest = [int(word) for word in record["output"].split()]
        assert given + rest == extend("cot", given, 256, 5)
    # the same weights at other frequencies: losses differ, and most of all for long sequences
    losses = {row["name"]: row["loss"] for row in rows if row["exit"] == 2}
    assert len({tuple(one) for one in losses.values()}) == len(NAMES)
