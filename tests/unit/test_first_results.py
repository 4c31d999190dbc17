"""Parts of lab/first_results.py: split, rates, steps, commands, tables, with numbers by hand."""

import json
import os
import sys
from pathlib import Path

import pytest

from lab.results.experiments import cldr, make_quick
from lab.results.measured import Number, Numbers
from lab.results.page import OPENINGS
from lab.results.pages import page_head
from lab.results.picture import ResultPanel, draw
from lab.results.rates import choose_rate, chosen_rate, trained_depths
from lab.results.recipe import (
    HEADS,
    evaluate_step,
    final_step,
    head_sweep_steps,
    shown,
    sweep_folder,
    sweep_steps,
)
from lab.results.steps import PYTHON, Runner, Step, StepError
from lab.results.tables import (
    describe_cost,
    differences_table,
    findings,
    measures_table,
    spread_table,
)
from megatron_sorted.data.preparation.split import (
    drop_copies,
    read_samples,
    repeat_to,
    split_samples,
)
from megatron_sorted.errors import DataError
from megatron_sorted.installation import ROOT
from megatron_sorted.reporting.drawing import place_name

APPEND = "import sys\nwith open(sys.argv[1], 'a') as file: file.write(sys.argv[2])"
LOSSES = {
    "before": (9.0, 4.0, 1.5),
    "ordinary": (9.5, 4.5, 1.25),
    HEADS: (5.0, 3.0, 1.25),
    "nested": (8.0, 2.0, 1.375),
}


def writing(path: Path, text: str, needs: tuple[str, ...] = ()) -> Step:
    """Return a step that appends ``text`` to ``path``, so that the file counts how often it ran."""
    return Step(
        path.name, "append", ("python", "-c", APPEND, str(path), text), (path,), needs=needs
    )


def evaluation(shift: float = 0.0) -> dict:
    """Return a record of `evaluate` for three depths; the nested model's losses are shifted."""

    def exits(name: str) -> dict:
        result = {}
        for place, depth in enumerate(("1", "2", "3")):
            value = LOSSES[name][place] + (shift if name == "nested" else 0.0)
            minus = {
                other: {"value": value - LOSSES[other][place], "standard_error": 0.01}
                for other in ("ordinary", HEADS)
                if other != name
            }
            result[depth] = {"loss": value, "loss_standard_error": 0.05, "loss_minus": minus}
        return result

    cost = {
        "exits": {
            str(depth): {"parameters": 1000 * depth, "flops_per_token": 500 * depth}
            for depth in (1, 2, 3)
        }
    }
    return {
        "models": dict.fromkeys(LOSSES, cost),
        "questions": {},
        "texts": {
            "held_out": {
                "documents": 4,
                "models": {name: {"tokens": 90, "exits": exits(name)} for name in LOSSES},
            }
        },
    }


def test_samples_are_split_without_copies(tmp_path):
    (tmp_path / "a.txt").write_text(
        "One  story.\n##\n\n two ##one\nSTORY.## ##three##four", encoding="utf-8"
    )
    samples = drop_copies(read_samples(tmp_path / "a.txt", "##"))
    assert [sample["text"] for sample in samples] == ["One  story.", "two", "three", "four"]
    sets = split_samples(samples, 1, 2)
    assert {name: [sample["text"] for sample in chosen] for name, chosen in sets.items()} == {
        "held_out": ["One  story."],
        "tuning": ["two", "three"],
        "train": ["four"],
    }
    with pytest.raises(DataError, match="2 \\+ 2 of 4 samples leave none"):
        split_samples(samples, 2, 2)
    with pytest.raises(DataError, match="--separator is missing"):
        read_samples(tmp_path / "a.txt", None)
    (tmp_path / "a.jsonl").write_text(
        '{"instruction": "A", "output": "b"}\n\n{"instruction": "a", "output": "B"}\n',
        encoding="utf-8",
    )
    assert drop_copies(read_samples(tmp_path / "a.jsonl", None)) == [
        {"instruction": "A", "output": "b"}
    ]


def test_samples_are_repeated_up_to_a_number_of_tokens():
    samples = [{"text": name} for name in "abc"]
    assert [sample["text"] for sample in repeat_to(samples, [5, 1, 4], 16)] == [
        "a",
        "b",
        "c",
        "a",
        "b",
    ]
    assert [sample["text"] for sample in repeat_to(samples, [5, 1, 4], 5)] == ["a"]
    with pytest.raises(DataError, match="no token"):
        repeat_to(samples, [0, 0, 0], 5)


def test_a_rate_is_chosen_by_the_depths_a_method_trains():
    losses = {"1e-3": {2: 2.0, 3: 1.5}, "3e-3": {2: 1.5, 3: 1.75}}
    assert (
        choose_rate(losses, (3,)) == "1e-3"
        and choose_rate(losses, (2, 3)) == "3e-3"
        and choose_rate(losses, (2,)) == "3e-3"
    )


def test_each_method_has_the_same_command_but_for_rate_and_coefficients(tmp_path):
    recipe, steps = cldr(tmp_path)
    assert [step.name for step in steps][-1] == "train-original" and recipe.data_steps == (
        "train-original",
    )
    assert [trained_depths(recipe, method) for method in ("ordinary", "nested", "heads")] == [
        (6,),
        (1, 2, 3, 4, 6),
        (1, 2, 3, 4),
    ]
    ordinary, nested, linear = (
        final_step(recipe, method, "1e-3", 2).command
        for method in ("ordinary", "nested", "nested-linear")
    )
    assert ordinary[-5:] == ("--exit-layer-weight", "0", "0", "0", "0") and linear[-2:] == (
        "--exit-layer-weight-rule",
        "linear",
    )
    assert [word.replace("ordinary", "nested") for word in ordinary[:-5]] == list(nested)
    assert [word.replace("nested-linear", "nested") for word in linear[:-2]] == list(nested)
    assert len(sweep_steps(recipe)) == 6 and len(head_sweep_steps(recipe)) == 3
    first, second = (evaluate_step(recipe, ("ordinary", "nested"), "1e-2", seed) for seed in (1, 2))
    assert any(word.startswith("before=") for word in first.command) and not any(
        word.startswith("before=") for word in second.command
    )
    assert f"train_{250 * 8 * 128}.jsonl" in first.command[first.command.index("--train-heads") + 1]


def test_without_a_choice_nothing_is_tried(tmp_path):
    recipe = make_quick(cldr(tmp_path)[0])
    assert (
        sweep_steps(recipe) == []
        and head_sweep_steps(recipe) == []
        and chosen_rate(recipe, "nested") == recipe.rates["nested"][0]
    )


def test_the_chosen_rate_is_read_from_the_runs(tmp_path):
    recipe, _ = cldr(tmp_path)
    for rate, last in zip(recipe.rates["ordinary"], (1.5, 1.25, 2.0), strict=True):
        folder = sweep_folder(recipe, "ordinary", rate)
        folder.mkdir(parents=True)
        (folder / "evaluation.json").write_text(
            json.dumps({"sets": {"tuning": {"1": {"loss": 9 - last}, "6": {"loss": last}}}})
        )
    assert chosen_rate(recipe, "ordinary") == recipe.rates["ordinary"][1]
    (folder / "evaluation.json").write_text("{}")
    with pytest.raises(DataError, match="not an evaluation of the trainer"):
        chosen_rate(recipe, "ordinary")


def test_a_step_runs_again_when_one_it_needs_has_changed(tmp_path, capfd):
    one, two, other = tmp_path / "one", tmp_path / "two", tmp_path / "other"

    def run(text: str) -> None:
        Runner(tmp_path / "out", 3).run(
            [writing(one, text), writing(two, "b", ("one",)), writing(other, "c")]
        )

    run("a")
    run("a")
    assert (one.read_text(), two.read_text(), other.read_text()) == ("a", "b", "c")
    assert capfd.readouterr().out.count("finished before, skipped") == 3
    run("x")
    assert (one.read_text(), two.read_text(), other.read_text()) == ("ax", "bb", "c")
    two.unlink()
    run("x")
    assert (one.read_text(), two.read_text()) == ("ax", "b")


def test_a_failing_step_says_so_and_is_not_remembered(tmp_path):
    failing = Step("fails", "fail", ("python", "-c", "raise SystemExit(7)"), ())
    silent = Step("silent", "nothing", ("python", "-c", ""), (tmp_path / "absent",))
    with pytest.raises(StepError, match="fails: ended with exit code 7"):
        Runner(tmp_path, 1).run([failing])
    with pytest.raises(StepError, match=r"did not write .*absent"):
        Runner(tmp_path, 1).run([silent])
    assert not list((tmp_path / "finished_steps").iterdir())


def test_tables_hold_the_measurements():
    numbers = Numbers([evaluation()])
    assert numbers.models == ["before", "ordinary", HEADS, "nested"] and numbers.depths == [1, 2, 3]
    rows = measures_table(numbers, "texts", "held_out", (2,))
    assert (
        rows[0] == "| depth | parameters | FLOPs | before | ordinary fine-tuning | SFT+ICT"
        " | nested fine-tuning |"
    )
    assert (
        rows[2]
        == "| 1 * | 1,000 | 33 % | 9.000 ± 0.050 | 9.500 ± 0.050 | 5.000 ± 0.050 | 8.000 ± 0.050 |"
    )
    assert (
        rows[4]
        == "| 3 | 3,000 | 100 % | 1.500 ± 0.050 | 1.250 ± 0.050 | 1.250 ± 0.050 | 1.375 ± 0.050 |"
    )
    assert (
        differences_table(numbers, "texts", "held_out")[3]
        == "| 2 | -2.500 ± 0.010 | -1.000 ± 0.010 |"
    )
    lines = " ".join(findings(numbers, "held_out", (2,)))
    assert "4.00 nats per token before, 4.50 after ordinary fine-tuning, 2.00 after nested" in lines
    assert (
        "It costs something at full depth**: +0.125 ± 0.010 nats" in lines and "(+10.0 %" in lines
    )
    assert "ahead at every exit: -1.000 at depth 2" in lines
    assert spread_table(numbers, "texts", "held_out") == []
    assert [describe_cost(Number(value, 0.5, None)) for value in (-1.25, -1.0, 1.0, 1.25)] == [
        "It is ahead",
        *["No difference that stands out"] * 2,
        "It costs something",
    ]


def test_seeds_are_averaged_and_their_spread_is_shown():
    second = evaluation(0.25)
    del second["texts"]["held_out"]["models"]["before"]  # measured once
    numbers = Numbers([evaluation(), second])
    result = numbers.number("texts", "held_out", "nested", 2, "loss")
    assert (result.value, result.error) == (2.125, 0.05) and result.spread == pytest.approx(
        0.25 / 2**0.5
    )
    assert numbers.number("texts", "held_out", "before", 2, "loss").spread is None
    assert numbers.difference("texts", "held_out", "nested", HEADS, 2, "loss").value == -0.875
    assert spread_table(numbers, "texts", "held_out")[4:6] == [
        "| 1 | 0.0000 | 0.0000 | 0.1768 |",
        "| 2 | 0.0000 | 0.0000 | 0.1768 |",
    ]


def test_a_name_stands_beside_its_line_and_over_nothing():
    panel, size = (0.0, 0.0, 200.0, 100.0), (40.0, 10.0)
    line = [(50.0, 50.0), (150.0, 20.0)]
    straight = [(float(x), 50.0 - 0.3 * (x - 50)) for x in range(50, 151)]
    assert place_name(line, size, straight, [], panel) == (3.0, 57.0, 43.0, 67.0)
    left_taken = [(0.0, 0.0, 60.0, 100.0)]
    result = place_name(line, size, straight, left_taken, panel)
    assert result[0] >= 60 and not any(
        result[0] <= x <= result[2] and result[1] <= y <= result[3] for x, y in straight
    )
    high = place_name([(50.0, 500.0)], size, [], [], panel)
    assert high == (0.0, 100.0, 40.0, 110.0)  # no point to stand at: above the panel


def test_the_picture_is_drawn(tmp_path):
    numbers = Numbers([evaluation(), evaluation(0.5)])
    panels = [
        ResultPanel("texts", "held_out", "loss", "all", "nats"),
        ResultPanel("texts", "held_out", "loss", "part", "nats", 2, 3.5),
    ]
    draw(numbers, panels, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[16:24] == (1400).to_bytes(4, "big") + (620).to_bytes(
        4, "big"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(("part", "name"), [("stories", "stories260k"), ("cldr", "cldr")])
def test_pages_of_the_documentation_begin_as_they_are_written(part, name):
    page = (ROOT / "docs" / "results" / f"{name}.md").read_text(encoding="utf-8")
    title, purpose, _ = OPENINGS[part]
    assert page.startswith("\n".join(page_head(title, purpose)))


def test_a_page_names_files_from_outside_without_their_folders(tmp_path):
    recipe, steps = cldr(Path("runs/x"))
    text = tmp_path / "stories.txt"
    step = Step(
        "split",
        "",
        ("python", "tool.py", "--input", str(text), "--separator", "<|a b|>"),
        (),
        reads=(text,),
    )
    assert shown(step, recipe) == "    python tool.py --input stories.txt --separator '<|a b|>'"
    lines = shown(steps[-1], recipe).splitlines()
    assert (
        len(lines) > 1
        and all(len(line) <= 140 for line in lines)
        and all(line.endswith(" \\") for line in lines[:-1])
    )
    assert sys.executable not in "".join(lines)


def test_a_file_from_outside_counts_by_its_content_not_by_its_time(tmp_path):
    text, made = tmp_path / "text.txt", tmp_path / "made"
    text.write_text("one")
    step = Step(
        "write", "", (PYTHON, "-c", f"open({str(made)!r}, 'a').write('x')"), (made,), reads=(text,)
    )
    for content, time in (("one", 1), ("one", 2), ("two", 2)):
        text.write_text(content)
        os.utime(text, (time, time))
        Runner(tmp_path, 1).run([step])
    assert made.read_text() == "xx"


def test_samples_of_records_whatever_the_file_is_called(tmp_path):
    rows = [{"text": "a\u2028b"}, {"text": "c", "messages": None}]
    for name, content in (
        ("a.txt", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
        ("a.json", json.dumps(rows)),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert read_samples(tmp_path / name, None) == rows
    (tmp_path / "a.jsonl").write_text("no record")
    with pytest.raises(DataError, match=r"a\.jsonl:1: not_json"):
        read_samples(tmp_path / "a.jsonl", "|")
