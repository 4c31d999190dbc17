"""The planning tool from its command line, which compares dry runs with the plan."""

import json
import os
import subprocess
import sys

import pytest

from tests.rules.sources import ROOT
from tests.support.commands import run_command
from tests.support.layouts import thinned
from tests.support.planned_run import RUN

RUN_ON_CPU = RUN + "device: cpu\n"
LAYOUTS = {
    "tp2 pp2 dp2": (
        8,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --global-batch-size 16 "
        "--use-distributed-optimizer --bf16 --overlap-grad-reduce --overlap-param-gather",
    ),
    "unequal chunks, sandwich": (
        8,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel "
        "--pipeline-model-parallel-layout Et|t*3|tt|ttL --use-sandwich-norm "
        "--untie-embeddings-and-output-weights --recompute-granularity full --global-batch-size 16",
    ),
    "blocks of their own, bf16": (
        4,
        "--pipeline-model-parallel-size 4 --use-exit-block --use-exit-norm "
        "--untie-exit-output-weights --bf16 --recompute-granularity selective "
        "--global-batch-size 16",
    ),
    "GELU, biases, an exit that does not train": (
        4,
        "--pipeline-model-parallel-size 2 --use-exit-mlp --no-swiglu --no-disable-bias-linear "
        "--normalization LayerNorm --qk-layernorm --position-embedding-type learned_absolute "
        "--recompute-granularity full --exit-layer-weight 0 1 1",
    ),
    "blocks of exits, MLPs again": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --use-exit-block "
        "--recompute-granularity selective --recompute-modules mlp --use-sandwich-norm",
    ),
    "grouped queries, some layers again": (
        4,
        "--tensor-model-parallel-size 2 --group-query-attention --num-query-groups 2 "
        "--add-qkv-bias --recompute-granularity full --recompute-method block "
        "--recompute-num-layers 2",
    ),
}


def plan(tmp_path, world_size: int, *arguments: str) -> subprocess.CompletedProcess:
    """Return what the tool did with a small run."""
    path = tmp_path / "run.yaml"
    path.write_text(RUN_ON_CPU.format(world_size=world_size))
    return run_command("tools/plan.py", path, *arguments, cwd=tmp_path, PYTHONWARNINGS="ignore")


@pytest.mark.parametrize(
    "name",
    thinned(LAYOUTS, "tp2 pp2 dp2", "unequal chunks, sandwich", "blocks of exits, MLPs again"),
)
def test_every_rank_built_and_stepped_dry_is_as_planned(name, tmp_path):
    world_size, arguments = LAYOUTS[name]
    done = plan(tmp_path, world_size, *arguments.split(), "--dry-run", "all", "--json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    dry = json.loads(done.stdout)["dry_run"]
    assert dry["ranks"] == world_size and dry["problems"] == []
    assert (dry["messages"] > 0) == ("pipeline" in arguments)


@pytest.mark.parametrize("ranks", ["0", pytest.param("all", marks=pytest.mark.long)])
def test_the_flagship_is_stepped_dry_as_planned(ranks):
    """38 billion parameters on 128 NPUs, whose parameters are gathered while forward goes on."""
    done = run_command(
        "tools/plan.py", "examples/pangu_38b_16x8.yaml", "--dry-run", ranks, cwd=ROOT, seconds=3000
    )
    assert done.returncode == 0 and "everything as planned" in done.stdout, (
        done.stdout[-2000:] + done.stderr[-2000:]
    )


def test_a_wrong_plan_is_noticed(tmp_path):
    """The same dry run, compared with the plan of another vocabulary."""
    code = (
        "import dataclasses, sys\n"
        "from megatron_sorted.dry_run.ranks import dry_run\n"
        "from megatron_sorted.planning.devices import DEVICES\n"
        "from megatron_sorted.planning.estimate import make_plan\n"
        "from megatron_sorted.settings.load import load_settings\n"
        "settings = load_settings(['--config', sys.argv[1]])\n"
        "plan = make_plan(settings, 2000, 2, DEVICES['cpu'], 256)\n"
        "import megatron_sorted.dry_run.ranks as module\n"
        "messages, operations = module.messages_of_stage, module.operations_of_chunk\n"
        "wrong = lambda *given: dataclasses.replace(messages(*given), gradients=10**6)\n"
        "module.messages_of_stage = wrong\n"
        "module.operations_of_chunk = lambda s, c, v, r: operations(s, c, 2 * v, r)\n"
        "print(dry_run(settings, 1000, 2, plan, None, False, lambda text: None).problems)\n"
    )
    path = tmp_path / "run.yaml"
    path.write_text(RUN_ON_CPU.format(world_size=2))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for arguments in (
        "parameters, planned",
        "operations, planned",
        "bytes in collectives (gradients), planned",
    ):
        assert arguments in done.stdout


def test_the_plan_is_printed_without_torch_and_with_the_launch_line(tmp_path):
    done = plan(tmp_path, 8, "--pipeline-model-parallel-size", "2", "--search", "--show", "3")
    assert done.returncode == 0, done.stderr
    for arguments in (
        "8 processes: tensor 1 x pipeline 2 x data 4",
        "memory of one rank, GB",
        "slowest stage",
        "layouts fit into",
        "the first: --",
        "torchrun --nproc-per-node 8 pretrain_sorted.py --config",
    ):
        assert arguments in done.stdout
    small = plan(tmp_path, 8, "--memory-gb", "0.001", "--json")
    shown = json.loads(small.stdout)
    assert (
        small.returncode == 1
        and shown["fits"] is False
        and shown["launch"].startswith("torchrun --nproc-per-node 8 ")
    )
