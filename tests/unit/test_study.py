"""The pure parts of tools/study.py: gaps, the front, goals, flags and steps, written by hand."""

import json
from pathlib import Path

import pytest

from lab.results.pages import page_head
from lab.results.rates import trainer_losses
from lab.results.recipe import Recipe
from lab.results.steps import Runner, Step, StepError
from lab.studies.outcomes import Estimate, Outcomes, beyond, estimate, front, meets_goal
from lab.studies.page import chosen, write_page
from lab.studies.picture import in_view
from lab.studies.plan import StudyPlan
from lab.studies.variants import FAMILIES, VARIANTS, expand
from lab.study import TITLES
from megatron_sorted.errors import DataError
from megatron_sorted.installation import ROOT
from megatron_sorted.settings.load import load_settings
from megatron_sorted.settings.rules import check_settings

# three seeds; separate models say 2.0 and 1.0
SEPARATE = [{2: 2.0, 4: 1.0}, {2: 2.1, 4: 1.1}, {2: 1.9, 4: 0.9}]
UNIFORM = [
    {2: 2.2, 4: 1.4},
    {2: 2.31, 4: 1.49},
    {2: 2.09, 4: 1.31},
]  # gaps 0.2, 0.21, 0.19 and 0.4, 0.39, 0.41


def outcomes(**others) -> Outcomes:
    return Outcomes(SEPARATE, SEPARATE, {"uniform": UNIFORM, **others})


def shifted(shallow: float, full: float) -> list[dict]:
    """Return uniform's losses moved by so much at both depths, in every seed."""
    return [{2: losses[2] + shallow, 4: losses[4] + full} for losses in UNIFORM]


def test_means_have_intervals_of_students_t():
    result = estimate([1.0, 2.0, 3.0])
    assert result.value == 2.0 and result.half_width == pytest.approx(
        4.303 / 3**0.5, abs=1e-3
    )  # deviation 1, 2 degrees of freedom
    assert estimate([1.5]) == Estimate(1.5, None)
    assert (
        Estimate(-0.1, 0.05).below_zero
        and not Estimate(-0.1, 0.2).below_zero
        and not Estimate(-0.1, None).below_zero
    )
    assert Estimate(0.1, 0.05).above_zero and str(Estimate(-0.1234, 0.01)) == "-0.123 ± 0.010"


def test_gaps_are_paired_by_seed():
    result = outcomes()
    assert result.depths == [2, 4]
    gap = result.gap("uniform", 4)
    assert gap.value == pytest.approx(0.4) and gap.half_width == pytest.approx(
        4.303 * 0.01 / 3**0.5, rel=1e-3
    )
    assert result.mean_gap("uniform").value == pytest.approx(0.3) and result.mean_gap(
        "uniform"
    ).half_width == pytest.approx(0.0, abs=1e-9)
    assert result.loss("uniform", 2).value == pytest.approx(2.2) and result.separate_loss(
        4
    ).value == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("shallow", "full", "goals"),
    [
        (-0.2, 0.0, ["mean"]),  # mean gap 0.3 -> 0.2: a third, the full depth as it was
        (-0.18, 0.0, []),  # less than a third
        (0.14, -0.14, ["full"]),  # full gap 0.4 -> 0.26, the mean as it was
        (0.2, -0.14, []),  # the mean is worse
        (-0.3, -0.3, ["mean", "full"]),
        (-0.3, 0.05, []),  # the full depth is worse
    ],
)
def test_goals(shallow, full, goals):
    result = outcomes(other=shifted(shallow, full))
    assert meets_goal(result, "other") == goals


def test_what_seeds_do_not_bear_out_is_no_gain():
    noisy = [
        {2: losses[2] - gain, 4: losses[4]}
        for losses, gain in zip(UNIFORM, (0.0, 0.3, 0.6), strict=True)
    ]
    assert meets_goal(outcomes(other=noisy), "other") == []


def test_a_gap_that_is_none_cannot_be_closed():
    result = Outcomes(UNIFORM, UNIFORM, {"uniform": SEPARATE, "other": SEPARATE})
    unsure = Outcomes(
        SEPARATE,
        [],
        {"uniform": [{2: 2.2, 4: 1.0}, {2: 2.1, 4: 1.0}, {2: 1.8, 4: 0.9}], "other": SEPARATE},
    )
    assert unsure.mean_gap("uniform").value > 0 and unsure.closed("other") is None, (
        "within the noise of seeds there is none either"
    )
    assert (
        result.closed("other") is None
        and result.closed("other", full=True) is None
        and meets_goal(result, "other") == []
    )


def test_the_front_and_what_lies_beyond():
    line = front([(0.1, 0.5), (0.2, 0.3), (0.15, 0.6), (0.4, 0.2), (0.5, 0.25), (0.2, 0.35)])
    assert line == [(0.1, 0.5), (0.2, 0.3), (0.4, 0.2)]
    assert beyond((0.3, 0.2), line) == pytest.approx(0.05)  # the line is at 0.25 there
    assert beyond((0.15, 0.5), line) == pytest.approx(-0.1)
    assert beyond((0.05, 0.1), line) is None
    assert beyond((0.9, 0.1), line) == pytest.approx(0.1)


def test_what_is_far_worse_does_not_crowd_the_picture():
    points = {
        "uniform": (0.2, 0.2),
        "better": (0.1, 0.1),
        "near": (0.23, 0.25),
        "right": (0.3, 0.15),
        "high": (0.1, 0.5),
    }
    shown, outside = in_view(points, "uniform", (0.01, 0.01))
    assert list(shown) == ["uniform", "better", "near"] and list(outside) == ["right", "high"]
    worse = {"uniform": (0.2, 0.2), "right": (0.9, 0.2)}
    assert in_view(worse, "uniform", (0.0, 0.0)) == (worse, {})
    assert "right" in in_view(points, "uniform", (0.06, 0.01))[0], "within the noise's reach"


TEACHERS = {"start": "base", "separate": "trained"}


def test_flags_of_a_variant():
    depths, references = (2, 3, 5), {2: 2.5, 3: 2.25, 5: 1.5}
    flags = expand(VARIANTS["excess-loss"], depths, references, 400, TEACHERS)
    assert flags == [
        "--exit-layer-weight-rule",
        "excess_loss",
        "--exit-reference-loss",
        "2.5000",
        "2.2500",
        "1.5000",
    ]
    assert expand(VARIANTS["guard"], depths, references, 400, TEACHERS) == [
        "--exit-guard",
        "--exit-guard-loss",
        "1.5000",
    ]
    assert expand(VARIANTS["cool-down"], depths, {}, 400, TEACHERS) == [
        "--exit-layer-weight",
        "0.1",
        "0.1",
        "1",
        "--exit-layer-weight-init",
        "1",
        "1",
        "1",
        "--exit-layer-weight-warmup-iters",
        "400",
    ]
    assert expand(VARIANTS["start-0.5"], depths, {}, 400, TEACHERS) == [
        "--exit-kd-weight",
        "0.5",
        "--exit-kd-teacher",
        "base",
    ]
    assert expand(VARIANTS["taught-1"], depths, {}, 400, TEACHERS) == [
        "--exit-kd-weight",
        "1",
        "--exit-kd-teacher",
        "trained",
    ]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_run_that_can_be_started(name):
    flags = expand(VARIANTS[name], (2, 3, 5), {2: 2.5, 3: 2.25, 5: 1.5}, 400, TEACHERS)
    settings = load_settings(
        [
            "--num-layers",
            "5",
            "--hidden-size",
            "64",
            "--num-attention-heads",
            "4",
            "--exit-layer-nums",
            "2",
            "3",
            "--vocab-size",
            "100",
            "--mock-data",
            "--train-iters",
            "400",
            *flags,
        ]
    )
    check_settings(settings, 1)
    assert VARIANTS[name].family in FAMILIES


TITLE = ("A title", "a purpose")


def make_plan(folder: Path) -> StudyPlan:
    recipe = Recipe(
        folder,
        Path("base"),
        (2,),
        (2, 4),
        seq_length=8,
        num_steps=20,
        num_sweep_steps=5,
        warmup=2,
        held_out=(),
        evaluate=(),
        head_batch_size=1,
        rates={"ordinary": ("1e-3", "1e-2"), "nested": ("3e-3",), "heads": ("1",)},
    )
    return StudyPlan(recipe, [])


def leave(plan: StudyPlan, name: str, held_out: dict, tuning: dict | None = None) -> None:
    path = plan.recipe.folder / "runs" / name / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    sets = {"held_out": held_out, "tuning": tuning or held_out}
    path.write_text(
        json.dumps(
            {
                "sets": {
                    key: {str(d): {"loss": loss} for d, loss in losses.items()}
                    for key, losses in sets.items()
                }
            }
        )
    )


def test_rates_references_and_steps(tmp_path):
    plan = make_plan(tmp_path)
    for depth, best in ((2, "1e-2"), (4, "1e-3")):
        for rate in ("1e-3", "1e-2"):
            leave(plan, f"rate-{depth}-{rate}", {depth: 0.0}, {depth: 1.0 if rate == best else 2.0})
        leave(plan, f"separate-{depth}-1", {depth: 0.5}, {depth: depth / 8})
    assert (plan.rate(2), plan.rate(4), plan.rate(None)) == ("1e-2", "1e-3", "3e-3")
    assert plan.references() == {2: 0.25, 4: 0.5}, (
        "of the samples kept for choosing, not of the held-out ones"
    )
    step = plan.variant_step(VARIANTS["excess-loss"], 2)
    flags = " ".join(step.command)
    assert (
        "--exit-reference-loss 0.2500 0.5000" in flags
        and "--seed 2 --train-iters 20 --lr 0.003" in flags
        and "--load base" in flags
    )
    slow = plan.variant_step(VARIANTS["uniform-slow"], 1)
    assert "--lr 0.001" in " ".join(slow.command)
    taught = plan.variant_step(VARIANTS["taught-1"], 2)
    assert f"--exit-kd-teacher {tmp_path}/runs/separate-4-2" in " ".join(
        taught.command
    ) and taught.needs == ("separate-4-2",)
    assert all("separate-4-2" in step.needs for step in plan.taught_steps(2))
    on, longer = plan.variant_step(VARIANTS["on"], 2), plan.variant_step(VARIANTS["longer"], 2)
    assert (
        f"--load {tmp_path}/runs/separate-4-2 --tokenizer-model base/tokenizer.model"
        in " ".join(on.command)
    )
    assert {"--finetune", "--use-checkpoint-args"} <= {*on.command} and on.needs == (
        "separate-4-2",
    )
    assert "--train-iters 40" in " ".join(longer.command) and longer.needs == ()
    separate = plan.separate_steps(1)
    assert [step.name for step in separate] == ["separate-2-1", "separate-4-1"] and separate[
        0
    ].needs == ("cut-2",)
    assert f"--load {tmp_path}/cut/2" in " ".join(
        separate[0].command
    ) and "--exit-layer-nums" not in " ".join(separate[0].command)


def test_the_page_states_the_results(tmp_path):
    plan = make_plan(tmp_path)
    for depth in (2, 4):
        for rate in ("1e-3", "1e-2"):
            leave(plan, f"rate-{depth}-{rate}", {depth: 1.0})
    names = ["others-0.3", "start-1", "dwa"]
    for seed in (1, 2, 3):
        for depth in (2, 4):
            leave(plan, f"separate-{depth}-{seed}", {depth: SEPARATE[seed - 1][depth]})
            leave(plan, f"taught-{depth}-{seed}", {depth: SEPARATE[seed - 1][depth] + 0.5})
        leave(plan, f"nested-uniform-{seed}", UNIFORM[seed - 1])
        reports = [
            {
                "kind": "train",
                "step": step,
                "exits": {"2": {"loss": 2.0, "gradient_cosine": cosine, "gradient_ratio": seed}},
            }
            for step, cosine in ((1, 0.25), (10, 0.5), (20, 0.25 * seed))
        ]
        (tmp_path / "runs" / f"nested-uniform-{seed}" / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in reports)
        )
        for name, (shallow, full) in {
            "others-0.3": (0.2, -0.1),
            "start-1": (-0.3, -0.3),
            "dwa": (0.1, 0.1),
        }.items():
            leave(plan, f"nested-{name}-{seed}", shifted(shallow, full)[seed - 1])
    measured = plan.outcomes(chosen(names), 3)
    assert list(measured.nested) == ["uniform", "others-0.3", "dwa", "start-1"]
    page, picture = write_page("stories", TITLE, plan, measured, [], tmp_path / "docs")
    text = page.read_text()
    assert text.startswith(
        "# A title: methods to weigh and train exits\n\n> **What this is for**: a purpose. "
    )
    assert "\n| method | gap @2 | gap @4 | mean gap |" in text
    assert "\n| method | flags of pretrain_sorted.py |" in text
    assert picture.stat().st_size > 20_000
    assert (
        "**KL to the start alone** closes 100 % of uniform's mean gap and 75 % of its gap at full"
        " depth" in text
    )
    assert "a smaller mean gap than those that come nearest: KL to the start alone." in text
    assert "goal 'mean' and goal 'full'" in text and "taught by that of full depth" not in text
    assert "| 2 | 0.25 | 0.50 | 2.00 |" in text, (
        "means over seeds of the first cosine, the last and the last ratio"
    )
    both = plan.outcomes(chosen(names), 3, with_taught=True)
    write_page("stories", TITLE, plan, both, [], tmp_path / "docs")
    assert "| 2 | 1e-3 | 2.000 ± 0.248 | 2.500 ± 0.248 |" in page.read_text()
    assert (
        "No better than uniform, neither in the mean nor at full depth: dynamic weight average."
        in text
    )
    (row,) = [
        line for line in text.splitlines() if line.startswith("| KL to the start alone | -0.100")
    ]
    assert row.startswith(
        "| KL to the start alone | -0.100 | +0.100 | +0.000 ± 0.000 | -0.300 ± 0.000"
        " | -0.300 ± 0.000 |"
    )


@pytest.mark.parametrize("name", TITLES)
def test_pages_of_the_documentation_begin_as_they_are_written(name):
    page = (ROOT / "docs" / "results" / f"study_{name}.md").read_text(encoding="utf-8")
    assert "\n".join(page_head(*TITLES[name])[2:]) in page


def test_a_missing_evaluation_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: cannot be read .*--fresh"):
        trainer_losses(tmp_path / "none.json", "held_out")


def waiting(name: str, folder: Path, code: str) -> Step:
    return Step(name, "wait", ("python", "-c", code, str(folder / name)), (folder / name,))


def test_jobs_run_at_a_time_and_leave_logs(tmp_path, capsys):
    code = """import sys, time, pathlib
print('started')
pathlib.Path(sys.argv[1] + '.began').touch()
end = time.monotonic() + 60
while len(list(pathlib.Path(sys.argv[1]).parent.glob('*.began'))) < 3:  # all three run at a time
    assert time.monotonic() < end, 'alone'
    time.sleep(0.01)
pathlib.Path(sys.argv[1]).write_text('x')"""
    runner = Runner(tmp_path, 3, jobs=3)
    runner.run([waiting(name, tmp_path, code) for name in "abc"])
    assert (tmp_path / "logs" / "b.log").read_text() == "started\n"
    Runner(tmp_path, 3, jobs=3).run([waiting(name, tmp_path, code) for name in "abc"])
    assert capsys.readouterr().out.count("finished before, skipped") == 3


def test_a_job_that_fails_shows_its_end_and_stops_the_rest(tmp_path, capsys):
    good = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('x')"
    steps = [
        waiting("bad", tmp_path, "print('the reason'); raise SystemExit(3)"),
        *(waiting(name, tmp_path, good) for name in "abcdef"),
    ]
    with pytest.raises(StepError, match="bad: ended with exit code 3"):
        Runner(tmp_path, 7, jobs=1).run(steps)
    assert "the reason" in capsys.readouterr().out and not (tmp_path / "f").exists()
