"""The line that a plan prints starts the run that was planned."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_sorted.planning.launch import launch_line
from megatron_sorted.settings.load import load_settings

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {
    "examples/pangu_38b_16x8.yaml": ("slurm/npu.sbatch", 128),
    "examples/llama2_13b_nested.yaml": ("slurm/gpu.sbatch", 16),
}


def test_one_host_needs_no_launcher():
    settings = load_settings(["--config", str(ROOT / "examples/llama2_7b_8gpu.yaml")])
    line = launch_line(settings, "my run.yaml", ["--lr", "1e-4"], 8, 8)
    assert line == "torchrun --nproc-per-node 8 pretrain_sorted.py --config 'my run.yaml' --lr 1e-4"


def test_an_installation_has_no_scripts_to_name():
    settings = load_settings(["--config", str(ROOT / "examples/llama2_7b_8gpu.yaml")])
    assert launch_line(settings, "a.yaml", [], 8, 8, in_clone=False) == (
        "torchrun --nproc-per-node 8 -m megatron_sorted train --config a.yaml"
    )
    assert launch_line(settings, "a.yaml", ["--lr", "1"], 16, 8, in_clone=False) == (
        "megatron-sorted launch slurm gpu --site SITE --nodes 2 a.yaml --lr 1"
    )


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_launcher_takes_the_line(example, tmp_path):
    script, processes = EXAMPLES[example]
    line = launch_line(
        load_settings(["--config", str(ROOT / example)]), example, ["--seed", "7"], processes, 8
    )
    assert line == f"{script} --site SITE --nodes {processes // 8} {example} --seed 7"
    (tmp_path / "site").write_text(
        f"DEVICES_PER_NODE=8\nPYTHON={shutil.which('false')}x\n"
    )  # not there: settings are checked on the nodes
    arguments = shlex.split(line.replace("SITE", str(tmp_path / "site")))
    done = subprocess.run(
        [arguments[0], "--print", *arguments[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (
        f"--nnodes={processes // 8} --nproc-per-node=8" in done.stdout and "--seed 7" in done.stdout
    )
