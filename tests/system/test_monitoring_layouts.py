"""A run is one run of Weights & Biases, for any number of ranks and resumes."""

import json

import pytest

from megatron_sorted.monitoring.json_lines import read_json_lines
from tests.support.command_line import pretrain
from tests.support.wandb_files import read_wandb_runs

WANDB = ("--wandb-project", "nested", "--wandb-mode", "offline", "--wandb-exp-name", "tiny")
LAYOUTS = {
    1: ("--pipeline-model-parallel-size", 1),
    2: ("--pipeline-model-parallel-size", 2),
    4: ("--pipeline-model-parallel-size", 2, "--micro-batch-size", 1),
}


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_one_run_from_one_rank_whatever_the_layout_and_after_a_resume(
    prepared, tmp_path, world_size
):
    for name in ("data", "run.yaml"):
        (tmp_path / name).symlink_to(prepared / name)
    arguments = (
        "--config",
        "run.yaml",
        "--save",
        "save",
        "--load",
        "save",
        "--eval-interval",
        "none",
        *LAYOUTS[world_size],
        *WANDB,
    )
    pretrain(world_size, tmp_path, *arguments, "--exit-interval", 2)
    pretrain(world_size, tmp_path, *arguments)
    run_id = json.loads((tmp_path / "save" / "run.json").read_text())["run_id"]
    manifests = [
        json.loads((tmp_path / "save" / f"iter_000000{step}" / "manifest.json").read_text())
        for step in (2, 4)
    ]
    assert {manifest["run_id"] for manifest in manifests} == {run_id}
    before, after = read_wandb_runs(
        tmp_path / "save"
    )  # a directory for each time it was started, of the same run
    assert (before.run_id, after.run_id) == (run_id, run_id) and (before.project, before.name) == (
        "nested",
        "tiny",
    )
    assert before.config["settings"]["num_layers"] == 4 and before.exit_code == after.exit_code == 0
    reports = {
        line["step"]: line
        for line in read_json_lines(tmp_path / "save" / "metrics.jsonl")
        if line["kind"] == "train"
    }
    rows = {}
    for row in (*before.rows, *after.rows):
        rows.setdefault(row["iteration"], {}).update(row)
    assert sorted(rows) == sorted(reports) == [1, 2, 3, 4]
    for step, line in reports.items():
        assert (
            rows[step]["lm loss"] == line["exits"]["4"]["loss"]
            and rows[step]["learning-rate"] == line["learning_rate"]
        )
        for depth, numbers in line["exits"].items():
            assert rows[step][f"exit_{depth}/loss"] == numbers["loss"]
            assert rows[step][f"exit_{depth}/coefficient"] == numbers["coefficient"]
            assert rows[step][f"exit_{depth}/agreement"] == numbers["agreement"]
            assert rows[step][f"exit_{depth}/grad-norm"] == numbers["grad_norm"]
            assert rows[step][f"exit_{depth}/accept-length"] == numbers["accept_length"]
    assert rows[4]["lm loss validation"] > 0
    steps = [row["_step"] for row in (*before.rows, *after.rows)]
    assert steps == sorted(steps), "wandb drops rows whose step does not rise"
