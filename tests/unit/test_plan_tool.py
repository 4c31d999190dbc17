"""The planning tool's errors, notes and launch lines."""

import json
import sys

import pytest

from megatron_sorted.commands import plan as plan_command
from megatron_sorted.errors import SettingsError
from tests.rules.sources import ROOT
from tests.support.planned_run import RUN


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """Return a function that runs the tool on a small run: (exit status or error, its output)."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def run(world_size, *arguments: str) -> tuple[object, str]:
        path = tmp_path / "run.yaml"
        path.write_text("# A run.\n" + RUN.format(world_size=world_size))
        own = [] if arguments and arguments[0].endswith(".yaml") else [str(path)]
        monkeypatch.setattr(sys, "argv", ["plan.py", *own, *arguments])
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
    "--group-query-attention --num-query-groups 2 --tensor-model-parallel-size 4": (
        "--num-query-groups: 2 is not a multiple of 4"
    ),
    "--vocab-size none": "--vocab-size",
    "--pipeline-model-parallel-size 4 --pipeline-model-parallel-layout Et*3|tt|ttL": (
        "--pipeline-model-parallel-layout: 3 chunks"
    ),
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_reported_in_a_line(arguments, plan):
    shown, _ = plan(4, *arguments.split())
    assert shown.startswith("error: ") and MISTAKES[arguments] in shown and "\n" not in shown


def test_an_invalid_number_of_processes_is_refused_with_its_line(plan):
    assert (
        "run.yaml, line 2, world-size: 'four' is not a value of this setting. "
        "Give a whole number or none." in plan("four")[0]
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
            f"note: {path}: '# {key}: {word}' is a comment. "
            f"Write it as a key of the file: {key}: {word}" in shown
        )


def test_a_gpu_of_the_file_does_not_stand_for_an_npu(plan, tmp_path):
    path = tmp_path / "gpu.yaml"
    path.write_text(RUN.format(world_size=8) + "planned-device: H100\n")
    shown = plan(8, str(path), "--device", "npu")[1]
    assert "step on 910B2" in shown
    assert "note: planned for 910B2: the file's planned-device H100 is not of --device npu" in shown
    assert "step on H100" in plan(8, str(path), "--device", "cuda")[1]
    assert "step on H100" in plan(8, str(path), "--device", "npu", "--planned-device", "H100")[1]


def test_a_missing_file_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["plan.py", str(tmp_path / "none.yaml")])
    with pytest.raises(SettingsError, match=r"none\.yaml: cannot be read"):
        plan_command.main()


def test_a_plan_without_a_launch_line_shows_the_reason(plan):
    arguments = ["--device", "cuda", "--planned-device", "H100"]
    assert (
        "no line to start it: 12 processes do not fill hosts of 8 devices"
        in plan(12, *arguments)[1]
    )
    shown = plan(16, *arguments, "--world-size", "32")[1]
    assert (
        "with world-size: 32 in " in shown
        and ", which says 16: slurm/gpu.sbatch --site SITE --nodes 4" in shown
    )
    assert plan(8, *arguments)[1].splitlines()[-1].startswith("torchrun --nproc-per-node 8 ")


@pytest.mark.parametrize(("device", "name"), [("cpu", "cpu"), ("npu", "910B2"), ("cuda", "H100")])
def test_what_is_planned_for_follows_the_kind_of_device(device, name, plan):
    assert f"step on {name}: " in plan(2, "--device", device)[1]


def test_fully_sharded_runs_are_planned(plan):
    status, shown = plan(4, "--data-parallel", "fsdp")
    assert status == 0 and "gathered" in shown and "which keeps 1 of 4 of their rows" in shown
    assert "gathered" not in plan(4)[1]


def test_limits_no_layout_keeps_and_the_numbers_for_programs(plan):
    status, shown = plan(8, "--device", "cpu", "--memory-gb", "0.001", "--search")
    assert status == 1 and "layouts surely fits into 0.0 GB a rank; the smallest needs" in shown
    status, shown = plan(8, "--device", "cpu", "--memory-gb", "0.001", "--json")
    assert status == 1 and json.loads(shown)["fits"] is False
    assert json.loads(shown)["launch"].startswith("torchrun --nproc-per-node 8 ")


def test_a_split_that_the_rules_refuse_is_not_proposed(plan):
    """Balanced for early exits, a chunk has fewer layers than are recomputed at a time."""
    arguments = [
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
    assert "--pipeline-model-parallel-layout" in plan(2, *arguments)[1]
    assert (
        "--pipeline-model-parallel-layout"
        not in plan(2, *arguments, "--recompute-num-layers", "4")[1]
    )


EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
# their tokenizers are made by a user
WITHOUT_TOKENIZER = {"demo_nested.yaml", "nested_52m.yaml", "draft_52m.yaml"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_planned_or_its_missing_vocabulary_requested(
    path, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)  # no data and no models lie here
    arguments = []
    if path.name in WITHOUT_TOKENIZER:
        monkeypatch.setattr(sys, "argv", ["plan.py", str(path)])
        with pytest.raises(
            SettingsError,
            match=r"--vocab-size: not given, .* Give the number of its tokens: --vocab-size N",
        ):
            plan_command.main()
        arguments = ["--vocab-size", "4096"]
    monkeypatch.setattr(sys, "argv", ["plan.py", str(path), *arguments])
    status = plan_command.main()
    shown = capsys.readouterr().out
    assert status == 0 and "memory: " in shown
    text = path.read_text()
    assert ("note: planned for" in shown) == (
        "\nplanned-device:" not in text and "device: cpu" not in text
    )
    for name in ("exit-kd-weight", "tune-exit"):
        assert (f"note: --{name} " in shown) == (f"{name}:" in text)


def test_what_is_proposed_fits_with_the_error_of_plans_to_spare(plan):
    arguments = ("--device", "cpu", "--search", "--json", "--show", "1000")
    proposed = json.loads(plan(8, *arguments)[1])["proposals"]
    least, largest = (choose(one["peak_bytes"] for one in proposed) for choose in (min, max))
    limit = (least + largest) / 2
    proposals = json.loads(plan(8, *arguments, "--memory-gb", f"{limit / 1e9:.9f}")[1])["proposals"]
    assert {one["peak_bytes"] for one in proposals} == {
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
    for share, arguments in (
        (0.99, "DOES NOT FIT"),
        (1.03, "MAY NOT FIT: plans were measured up to 7.5% too low"),
        (1.08, ": fits, with"),
    ):
        status, shown = plan(8, "--device", "cpu", "--memory-gb", f"{share * peak / 1e9:.9f}")
        assert arguments in shown and status == (share < 1)
