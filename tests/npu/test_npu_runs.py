"""Whole runs on NPUs from the command line, and the errors for missing parts."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sorted.monitoring.json_lines import read_json_lines
from megatron_sorted.platform.npu.adaptors import ADAPTORS
from megatron_sorted.platform.transformer_engine import TRIAL
from tests.support.engines import write_engine
from tests.support.npu_simulation.environment import ROOT, simulated_environment

pytestmark = pytest.mark.npu
ARGUMENTS = [
    "--mock-data", "--vocab-size", 200, "--num-layers", 4, "--hidden-size", 64,
    "--num-attention-heads", 4, "--exit-layer-nums", 1, 2, 3, "--device", "npu", "--bf16",
    "--seq-length", 32, "--micro-batch-size", 2, "--global-batch-size", 4, "--log-interval", 1,
    "--train-iters", 4, "--eval-interval", "none"]  # fmt: skip
ADAPTOR = """\
import sys
assert "torch" in sys.modules and "torch_npu" in sys.modules, "after torch"
assert not any(name.startswith("megatron.core") for name in sys.modules), "before megatron"
print("adaptor sees", sys.argv[1:], flush=True)
import torch
torch.Tensor.type = lambda self, kind=None, _own=torch.Tensor.type: (
    _own(self).replace("npu", "cuda") if kind is None else _own(self, kind))
torch.compile = lambda model=None, **options: model or (lambda function: function)
import os
os.environ["TORCH_NPU_DEVICE_CAPABILITY"] = "9.0"
"""


def pretrain(
    folder: Path, *arguments: object, processes: int = 0, **changes: str
) -> subprocess.CompletedProcess:
    """Return the finished run, in this environment, which has the simulation, with ``changes``."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if processes
        else []
    )
    command = [sys.executable, *launcher, str(ROOT / "pretrain_sorted.py"), *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **changes},
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )


def refusal(tmp_path: Path, *arguments: object, changes: dict[str, str] | None = None) -> str:
    """Return what a run says that cannot start, in the environment with ``changes``."""
    done = pretrain(tmp_path, *arguments, **(changes or {}))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stderr


def test_a_run_on_two_stages_saves_and_resumes_exactly(tmp_path):
    layout = ["--pipeline-model-parallel-size", 2, "--use-distributed-optimizer"]
    whole = pretrain(
        tmp_path, *ARGUMENTS, *layout, "--save", "whole", "--save-interval", 2, processes=2
    )
    assert whole.returncode == 0, whole.stdout + whole.stderr
    again = pretrain(
        tmp_path,
        *ARGUMENTS,
        *layout,
        "--load",
        "whole",
        "--ckpt-step",
        2,
        "--save",
        "again",
        processes=2,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "loaded whole/iter_0000002" in again.stdout
    first, second = (
        read_json_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "again")
    )
    losses = [{row["step"]: row["exits"] for row in rows} for rows in (first, second)]
    assert sorted(losses[0]) == [1, 2, 3, 4] and sorted(losses[1]) == [3, 4]
    for step in (3, 4):
        assert json.dumps(losses[1][step]) == json.dumps(losses[0][step])


@pytest.mark.parametrize("name", ADAPTORS)
def test_the_entry_point_alone_loads_torch_npu(name, tmp_path, monkeypatch):
    """Start where torch would load torch_npu by itself, before names are patched.

    An adaptor's place in the order is checked too, on a stand-in that patches torch as MindSpeed
    does; the real ones were not at hand.
    """
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    package, _, module = ADAPTORS[name].module.partition(".")
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / f"{module or '__init__'}.py").write_text(ADAPTOR)
    done = pretrain(
        tmp_path,
        *ARGUMENTS,
        "--train-iters",
        1,
        "--npu-adaptor",
        name,
        "--npu-adaptor-arguments=--optimization-level 1",
        PYTHONPATH=f"{os.environ['PYTHONPATH']}{os.pathsep}{tmp_path}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "adaptor sees ['--optimization-level', '1']" in done.stdout


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside NVIDIA's"])
def test_tenpu_is_refused(beside, tmp_path, monkeypatch):
    monkeypatch.delenv(TRIAL, raising=False)
    folder = write_engine(tmp_path, for_npus=True, nvidia_part=beside)
    message = refusal(
        tmp_path,
        *ARGUMENTS,
        changes={"PYTHONPATH": f"{os.environ['PYTHONPATH']}{os.pathsep}{tmp_path}"},
    )
    assert str(folder) in message and "pip uninstall transformer_engine" in message
    assert ("the distribution transformer_engine_torch" in message) == beside


def test_without_cann_the_missing_library_is_named(tmp_path):
    message = refusal(tmp_path, *ARGUMENTS, changes={"LD_LIBRARY_PATH": ""})
    assert "torch_npu needs libhccl.so, a library of CANN" in message and "set_env.sh" in message


def test_bf16_is_refused_on_the_first_generation_with_a_hint_at_fp16(tmp_path):
    message = refusal(tmp_path, *ARGUMENTS, changes=simulated_environment(name="Ascend910A"))
    assert "--bf16: the device (npu) does not support bf16. Use --fp16" in message


def test_no_npu_and_no_adaptor_are_sentences(tmp_path):
    assert "CANN sees no NPU" in refusal(
        tmp_path, *ARGUMENTS, changes=simulated_environment(devices=0)
    )
    assert "MindSpeed is not installed" in refusal(
        tmp_path, *ARGUMENTS, "--npu-adaptor", "mindspeed"
    )


def test_this_run_has_no_triton():
    """Say so where it has: the tests here then do not show Megatron without triton."""
    assert importlib.util.find_spec("triton") is None


def test_torch_npu_changes_nothing_for_a_run_on_the_cpu(tmp_path, monkeypatch):
    """torch_npu is installed here, and without CANN a plain ``import torch`` fails."""
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    plain = subprocess.run(
        [sys.executable, "-c", "import torch"], capture_output=True, text=True, check=False
    )
    assert plain.returncode == 1 and "libhccl.so" in plain.stderr
    arguments = ["auto" if word == "npu" else word for word in ARGUMENTS]
    done = pretrain(tmp_path, *arguments, "--train-iters", 1)
    assert done.returncode == 0, done.stdout + done.stderr
