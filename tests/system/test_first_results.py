"""lab/first_results.py from a model and a text to a page, with next to no training, two times."""

import json
import random
from pathlib import Path

import pytest

from tests.support.commands import run_command
from tests.support.evaluated import write_model

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = (
    "cat",
    "dog",
    "house",
    "bird",
    "mat",
    "night",
    "sign",
    "mother",
    "sat",
    "ran",
    "was",
    "the",
    "a",
    "on",
    "red",
    "small",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with a tiny random model and stories of random options."""
    path = tmp_path_factory.mktemp("results")
    write_model(path / "tiny", seed=1, max_position_embeddings=256)
    draw = random.Random(0)
    stories = [
        f"Story {number}. " + " ".join(draw.choices(VOCABULARY, k=40)) + "." for number in range(60)
    ]
    (path / "stories.txt").write_text("\n###\n".join([*stories, stories[7]]), encoding="utf-8")
    return path


def test_a_quick_run_writes_a_page_and_does_nothing_twice(folder):
    options = (
        "stories",
        "--model",
        "tiny",
        "--text",
        "stories.txt",
        "--separator",
        "###",
        "--num-held-out",
        8,
        "--num-tuning",
        4,
        "--quick",
        "--output",
        "out",
    )
    done = run_command("tools/first_results.py", *options, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (folder / "out" / "docs" / "results" / "tiny.md").read_text()
    assert str(folder) not in page.replace(str(folder / "out"), ""), (
        "files from outside stand there by name alone"
    )
    assert (folder / "out" / "docs" / "images" / "result_stories.png").stat().st_size > 20_000
    split = json.loads((folder / "out" / "data" / "split.json").read_text())
    assert [
        split[name] for name in ("samples", "copies_dropped", "held_out", "tuning", "train")
    ] == [61, 1, 8, 4, 48]
    evaluation = json.loads((folder / "out" / "evaluation" / "1" / "evaluation.json").read_text())
    assert list(evaluation["models"]) == ["before", "nested", "ordinary", "ordinary+ICT"]
    models = evaluation["texts"]["held_out"]["models"]
    for depth in ("1", "2", "3"):
        cells = [
            f"{exits[depth]['loss']:.3f} ± {exits[depth]['loss_standard_error']:.3f}"
            for exits in (
                models[name]["exits"] for name in ("before", "ordinary", "ordinary+ICT", "nested")
            )
        ]
        (row,) = [
            line
            for line in page.splitlines()
            if line.startswith(f"| {depth} ") and cells[0] in line
        ]
        assert row.split(" | ")[3:] == [*cells[:3], f"{cells[3]} |"]
    assert models["ordinary"]["exits"]["3"] != models["nested"]["exits"]["3"]
    again = run_command("tools/first_results.py", *options, cwd=folder)
    assert (
        again.returncode == 0
        and again.stdout.count("finished before, skipped") == 7
        and "pretrain_sorted.py" not in again.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stories", "--model", "none", "--text", "stories.txt"], "none: no such directory"),
        (["stories", "--model", "tiny", "--text", "none.txt"], "--text: "),
        (
            ["stories", "--model", "tiny", "--text", "stories.txt", "--seeds", 0],
            "--seeds: 0 is not at least 1",
        ),
        (["cldr", "--methods", "ordinary"], "--methods: nested is missing"),
    ],
)
def test_mistakes_are_one_line(folder, arguments, message):
    done = run_command("tools/first_results.py", *arguments, cwd=folder)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr, (
        done.stderr
    )
    assert len(done.stderr.strip().splitlines()) == 1
