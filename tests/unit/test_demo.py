"""The demo's way through its steps: order, skipping, stopping. Its training is run by the system
tests.
"""

import json
import sys
from pathlib import Path

import pytest

from lab.demo import QUESTIONS, demo_steps, exit_depths, in_short, run_all
from lab.results.steps import Step

APPEND = (
    "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.write_text(p.read_text() + sys.argv[2] "
    "if p.exists() else sys.argv[2])"
)


def writing(path: Path, text: str, *needs: str, always: bool = False) -> Step:
    """Return a step that appends ``text`` to ``path``, so that the file counts how often it ran."""
    return Step(
        path.name,
        "append",
        (sys.executable, "-c", APPEND, str(path), text),
        (path,),
        needs=needs,
        seconds=1,
        always=always,
    )


def test_finished_steps_are_skipped_and_later_ones_follow_a_changed_one(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    one, two, last = tmp_path / "one", tmp_path / "two", tmp_path / "last"
    steps = [
        writing(one, "a"),
        writing(two, "b", "one"),
        writing(last, "c", "one", "two", always=True),
    ]
    assert run_all(steps, tmp_path) == 0
    assert "step 1 of 3, one: append (about 1 s)" in capfd.readouterr().out
    assert run_all(steps, tmp_path) == 0
    assert (one.read_text(), two.read_text(), last.read_text()) == (
        "a",
        "b",
        "cc",
    )  # the last, the picture, is always drawn
    assert capfd.readouterr().out.count("finished before, skipped") == 2
    assert (
        run_all([writing(one, "x"), *steps[1:]], tmp_path) == 0
    )  # another command: it and all after it run
    assert (one.read_text(), two.read_text(), last.read_text()) == ("ax", "bb", "ccc")
    two.unlink()  # a lost file is made again
    assert run_all([writing(one, "x"), *steps[1:]], tmp_path) == 0
    assert (one.read_text(), two.read_text()) == ("ax", "b")


def test_a_failing_step_stops_with_its_exit_code(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    never = tmp_path / "never"
    failing = Step("fails", "fail", (sys.executable, "-c", "raise SystemExit(7)"), ())
    assert run_all([failing, writing(never, "a"), writing(tmp_path / "end", "b")], tmp_path) == 7
    assert not never.exists()
    assert "stops at step 1 of 3, fails: ended with exit code 7" in capfd.readouterr().err


def test_a_step_that_writes_nothing_stops_the_demo(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    silent = Step("silent", "do nothing", (sys.executable, "-c", ""), (tmp_path / "absent",))
    assert run_all([silent], tmp_path) == 1
    assert "did not write" in capfd.readouterr().err


def test_a_training_starts_with_an_empty_folder(tmp_path: Path) -> None:
    save = tmp_path / "save"
    save.mkdir()
    (save / "old_checkpoint").touch()
    step = Step(
        "train",
        "train",
        (sys.executable, "-c", f"import os; os.mkdir({str(save)!r})"),
        (save,),
        (save,),
    )
    assert run_all([step], tmp_path) == 0
    assert not list(save.iterdir())


def test_every_step_of_the_demo_follows_those_before_it(tmp_path: Path) -> None:
    steps = demo_steps(tmp_path, quick=True)
    assert [step.needs for step in steps] == [
        tuple(other.name for other in steps[:number]) for number in range(len(steps))
    ]
    assert [step.name for step in steps if step.always] == ["picture"]


def test_both_models_differ_in_nothing_but_coefficients_and_folder(tmp_path: Path) -> None:
    steps = {step.name: step for step in demo_steps(tmp_path, quick=False)}
    nested, plain = steps["train-nested"].command, steps["train-plain"].command
    assert plain[-5:] == ("--exit-layer-weight", "0", "0", "0", "0")
    assert [word for word in plain[:-5] if word not in nested] == [str(tmp_path / "plain")]
    assert len(plain) == len(nested) + 5
    assert sum(step.seconds for step in steps.values()) <= 300
    assert set(QUESTIONS) <= set(steps["questions"].command)


def test_the_result_in_a_sentence(tmp_path: Path) -> None:
    assert exit_depths() == [1, 2, 3, 4, 6]
    for name, small, large in (("nested", 0.841, 0.9), ("plain", 0.16, 0.926)):
        (tmp_path / name).mkdir()
        scores = {"1": {"exact_match": small}, "6": {"exact_match": large}}
        costs = {"1": {"flops_per_token": 30}, "6": {"flops_per_token": 120}}
        sets = {
            "phrasing": scores,
            "unseen": {"1": {"exact_match": 0.0}, "6": {"exact_match": 0.0}},
        }
        (tmp_path / name / "evaluation.json").write_text(
            json.dumps({"exits": costs, "sets": sets}), encoding="utf-8"
        )
    sentence = " ".join(in_short(tmp_path).split())
    assert "1 of 6 layers, 25 % of the computing, answer 84 %" in sentence
    assert "and 16 % in the ordinary one; all 6 layers answer 90 % and 93 %." in sentence
