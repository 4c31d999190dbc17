"""lab/study.py from a model and a text to a page, with next to no training; variants are added."""

import random
from pathlib import Path

import pytest

from tests.support.commands import run_command
from tests.support.evaluated import write_model
from tests.system.test_first_results import VOCABULARY

ROOT = Path(__file__).resolve().parents[2]


def test_a_quick_study_writes_a_page_and_can_be_added_to(tmp_path):
    write_model(tmp_path / "tiny", seed=1, max_position_embeddings=256)
    draw = random.Random(0)
    stories = [
        f"Story {number}. " + " ".join(draw.choices(VOCABULARY, k=40)) + "."
        for number in range(320)
    ]
    (tmp_path / "stories.txt").write_text("<|endoftext|>".join(stories), encoding="utf-8")
    options = (
        "stories",
        "--model",
        "tiny",
        "--text",
        "stories.txt",
        "--quick",
        "--seeds",
        1,
        "--jobs",
        2,
        "--output",
        "out",
        "--teach-separate",
        "--variants",
    )
    first = run_command("tools/study.py", *options, "excess-loss", cwd=tmp_path)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    added = run_command("tools/study.py", *options, "excess-loss", "start-1", cwd=tmp_path)
    assert added.returncode == 0, added.stdout[-3000:] + added.stderr[-3000:]
    trained = [line for line in added.stdout.splitlines() if "done after" in line]
    assert len(trained) == 1 and "start-1-1" in trained[0]
    page = (tmp_path / "out" / "docs" / "results" / "study_stories.md").read_text()
    assert "| the same, taught by that of full depth |" in page
    assert all(
        f"| {title} |" in page
        for title in ("uniform (SoFT)", "excess loss over separate models", "KL to the start alone")
    )
    assert (tmp_path / "out" / "docs" / "images" / "study_stories.png").stat().st_size > 20_000
    assert str(tmp_path) not in page.replace(str(tmp_path / "out"), "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stories", "--model", "none", "--text", "stories.txt"], "--text: "),
        (["cldr", "--seeds", 0], "--seeds: 0 is not at least 1"),
        (
            ["instructions", "--train", "none.jsonl", "--valid", "none.jsonl"],
            "none.jsonl: no such file",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    done = run_command("tools/study.py", *arguments, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr, (
        done.stderr
    )
    assert len(done.stderr.strip().splitlines()) == 1
