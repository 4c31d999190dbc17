"""What the planning tool says of mistakes, and of how a run is started."""

import json
import sys

import pytest

from megatron_sorted.commands import plan as plan_command
from megatron_sorted.errors import SettingsError
from tests.rules.sources import ROOT
from tests.support.planned_run import RUN


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """Returns a function that runs the tool on a small run: (exit status or message, what it printed)."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def run(world_size, *words: str) -> tuple[object, str]:
        path = tmp_path / "run.yaml"
        path.write_text("# A run.\n" + RUN.format(world_size=world_size))
        own = [] if words and words[0].endswith(".yaml") else [str(path)]
        monkeypatch.setattr(sys, "argv", ["plan.py", *own, *words])
        try:
            status = plan_command.main()
        except SettingsError as error:
            status = f"error: {error}"
        return status, capsys.readouterr().out

    return run


MISTAKES = {
    "--tensor-model-parallel-size 3": "is not a multiple of 3",
    "--planned-device X1": "--planned-device: X1",
    "--lora-rank 4": "is not counted by a plan",
    "--dry-run 4": "--dry-run: 4 is no rank of 4 processes",
    "--dry-run all 1": "--dry-run: all is no rank",
    "--dry-run all --data-parallel fsdp": "--dry-run: --data-parallel fsdp",
    "--memory-gb 0": "--memory-gb: 0 is not a number above 0",
    "--memory-gb -3": "--memory-gb: -3 is not a number above 0",
    "--memory-gb nan": "--memory-gb: nan is not a number above 0",
    "--world-size 0": "--world-size: 0 is not a whole number above 0",
    "--show 0": "--show: 0 is not a whole number",
    "--calibrate /there/is/no/such/folder/cpu.json": "--calibrate: /there",
    "--group-query-attention --num-query-groups 2 --tensor-model-parallel-size 4": "--num-query-groups: 2 is not a multiple of 4",
    "--vocab-size none": "--vocab-size",
    "--pipeline-model-parallel-size 4 --pipeline-model-parallel-layout Et*3|tt|ttL": "--pipeline-model-parallel-layout: 3 chunks",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_told_in_a_line(words, plan):
    said, _ = plan(4, *words.split())
    assert said.startswith("error: ") and MISTAKES[words] in said and "\n" not in said


def test_a_number_of_processes_that_is_none_is_refused_by_its_line(plan):
    assert (
        "run.yaml, line 2, world-size: 'four' is not what this setting takes. Give a whole number or none."
        in plan("four")[0]
    )


def test_a_file_of_version_0_8_is_planned_with_a_note(plan, tmp_path):
    text = RUN.format(world_size=4).replace("world-size", "# world-size")
    (tmp_path / "old.yaml").write_text(f"# planned-device: H100\n{text}device: cuda\n")
    status, shown = plan(1, str(tmp_path / "old.yaml"))
    path = tmp_path / "old.yaml"
    assert (
        status == 0 and "torchrun --nproc-per-node 4" in shown and "note: planned for" not in shown
    )
    for key, word in (("world-size", 4), ("planned-device", "H100")):
        assert (
            f"note: {path}: '# {key}: {word}' is a comment. Write it as a key of the file: {key}: {word}"
            in shown
        )


def test_a_file_that_is_not_there_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["plan.py", str(tmp_path / "none.yaml")])
    with pytest.raises(SettingsError, match=r"none\.yaml: cannot be read"):
        plan_command.main()


def test_where_no_line_starts_the_run_the_plan_says_why(plan):
    words = ["--device", "cuda", "--planned-device", "H100"]
    assert "no line to start it: 12 processes do not fill hosts of 8 devices" in plan(12, *words)[1]
    said = plan(16, *words, "--world-size", "32")[1]
    assert (
        "with world-size: 32 in " in said
        and ", which says 16: slurm/gpu.sbatch --site SITE --nodes 4" in said
    )
    assert plan(8, *words)[1].splitlines()[-1].startswith("torchrun --nproc-per-node 8 ")


@pytest.mark.parametrize(("device", "name"), [("cpu", "cpu"), ("npu", "910B2"), ("cuda", "H100")])
def test_what_is_planned_for_follows_the_kind_of_device(device, name, plan):
    assert f"step on {name}: " in plan(2, "--device", device)[1]


def test_fully_sharded_runs_are_planned(plan):
    status, said = plan(4, "--data-parallel", "fsdp")
    assert status == 0 and "gathered" in said and "which keeps 1 of 4 of their rows" in said
    assert "gathered" not in plan(4)[1]


def test_limits_no_layout_keeps_and_the_numbers_for_programs(plan):
    status, said = plan(8, "--device", "cpu", "--memory-gb", "0.001", "--search")
    assert status == 1 and "layouts surely fits into 0.0 GB a rank; the smallest needs" in said
    status, said = plan(8, "--device", "cpu", "--memory-gb", "0.001", "--json")
    assert status == 1 and json.loads(said)["fits"] is False
    assert json.loads(said)["launch"].startswith("torchrun --nproc-per-node 8 ")


def test_a_split_that_the_rules_refuse_is_not_proposed(plan):
    """Balanced for exits early on it has a chunk of fewer layers than are computed again at a time."""
    words = [
        "--pipeline-model-parallel-size",
        "2",
        "--exit-layer-nums",
        "1",
        "2",
        "3",
        "--global-batch-size",
        "16",
        "--recompute-granularity",
        "full",
        "--vocab-size",
        "20000",
        "--device",
        "cpu",
    ]
    assert "--pipeline-model-parallel-layout" in plan(2, *words)[1]
    assert (
        "--pipeline-model-parallel-layout" not in plan(2, *words, "--recompute-num-layers", "4")[1]
    )


EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
ASKED = {"demo_nested.yaml", "nested_52m.yaml"}  # their tokenizers are made by a user


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_planned_or_what_is_missing_is_asked_for(
    path, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)  # no data and no models lie here
    words = []
    if path.name in ASKED:
        monkeypatch.setattr(sys, "argv", ["plan.py", str(path)])
        with pytest.raises(
            SettingsError,
            match=r"--vocab-size: not said, .* Give the number of its tokens: --vocab-size N",
        ):
            plan_command.main()
        words = ["--vocab-size", "4096"]
    monkeypatch.setattr(sys, "argv", ["plan.py", str(path), *words])
    status = plan_command.main()
    said = capsys.readouterr().out
    assert status == 0 and "memory: " in said
    text = path.read_text()
    assert ("note: planned for" in said) == (
        "\nplanned-device:" not in text and "device: cpu" not in text
    )
    for name in ("exit-kd-weight", "tune-exit"):
        assert (f"note: --{name} " in said) == (f"{name}:" in text)


def test_what_is_proposed_fits_with_the_error_of_plans_to_spare(plan):
    words = ("--device", "cpu", "--search", "--json", "--show", "1000")
    proposed = json.loads(plan(8, *words)[1])["proposals"]
    least, largest = (choose(one["peak_bytes"] for one in proposed) for choose in (min, max))
    limit = (least + largest) / 2
    found = json.loads(plan(8, *words, "--memory-gb", f"{limit / 1e9:.9f}")[1])["proposals"]
    assert {one["peak_bytes"] for one in found} == {
        one["peak_bytes"] for one in proposed if one["peak_bytes"] <= 0.93 * limit
    }
    assert any(0.93 * limit < one["peak_bytes"] <= limit for one in proposed), (
        "none shows the margin"
    )


def test_a_plan_close_to_the_limit_says_so(plan):
    peak = max(
        stage["memory"]["total"]
        for stage in json.loads(plan(8, "--device", "cpu", "--json")[1])["plan"]["stages"]
    )
    for share, words in (
        (0.99, "DOES NOT FIT"),
        (1.03, "MAY NOT FIT: plans were measured up to 7.5% too low"),
        (1.08, ": fits, with"),
    ):
        status, said = plan(8, "--device", "cpu", "--memory-gb", f"{share * peak / 1e9:.9f}")
        assert words in said and status == (share < 1)
