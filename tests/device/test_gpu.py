"""The bodies of tests/ranks on NVIDIA GPUs, against the same CPU reference.

Every layout that the GPUs of this host allow is covered.

With one GPU, two ranks can share it only through gloo, which moves GPU tensors in all-reduce and
broadcast alone: enough for tensor and data parallelism, not for pipelines.
"""

import importlib.util
import json

import pytest
import torch

from tests.ranks.test_fsdp import LAYOUTS as SHARDED
from tests.ranks.test_layouts import LAYOUTS, compare
from tests.ranks.test_precision import BF16_GRADIENT, BF16_LOSS, check_against_reference
from tests.support.commands import run_command
from tests.support.layouts import FSDP
from tests.support.tiny import tiny

pytestmark = pytest.mark.gpu
ROWS = [
    name
    for name, (world_size, _) in LAYOUTS.items()
    if world_size <= max(1, torch.cuda.device_count())
]
IMPLEMENTATIONS = [
    "local",
    *(["transformer_engine"] if importlib.util.find_spec("transformer_engine") else []),
]
# kernels add up in another order than the CPU's
TOLERANCE = 1e-4


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ROWS)
def test_layout_equals_reference(name, implementation):
    world_size, changes = LAYOUTS[name]
    compare(world_size, tiny(**changes, device="cuda", transformer_impl=implementation), TOLERANCE)


@pytest.mark.parametrize("changes", [{}, {"tensor_model_parallel_size": 2}], ids=["dp2", "tp2"])
def test_two_ranks_share_a_gpu(changes):
    compare(
        2,
        tiny(**changes, device="cuda", distributed_backend="gloo", transformer_impl="local"),
        TOLERANCE,
    )


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, (world_size, _) in SHARDED.items()
        if world_size <= max(1, torch.cuda.device_count())
    ],
)
def test_fully_sharded_layout_equals_reference(name):
    world_size, changes = SHARDED[name]
    compare(world_size, tiny(**FSDP, **changes, device="cuda", transformer_impl="local"), TOLERANCE)


def test_packed_documents_with_few_trained_tokens():
    compare(1, tiny(device="cuda", transformer_impl="local"), TOLERANCE, unequal=True, packed=True)


def test_bf16_against_fp32_reference():
    check_against_reference(
        1, tiny(bf16=True, device="cuda", transformer_impl="local"), BF16_LOSS, BF16_GRADIENT
    )


def test_command_line_trains_saves_and_evaluates_again(tmp_path):
    arguments = [
        "--mock-data",
        "--vocab-size",
        500,
        "--num-layers",
        4,
        "--hidden-size",
        128,
        "--exit-layer-nums",
        1,
        2,
        3,
        "--device",
        "cuda",
        "--bf16",
        "--seq-length",
        64,
        "--train-iters",
        4,
        "--log-interval",
        1,
    ]
    for more in (["--save", "first"], ["--skip-train", "--load", "first", "--save", "second"]):
        done = run_command("pretrain_sorted.py", *arguments, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    first, second = (
        json.loads((tmp_path / name / "evaluation.json").read_text())["sets"]["mock"]
        for name in ("first", "second")
    )
    for depth in ("1", "2", "3", "4"):
        assert second[depth]["loss"] == pytest.approx(first[depth]["loss"], rel=1e-3)
