"""Between two reports a training step waits for the device once, as Megatron's optimizer does."""

from pathlib import Path

import pytest
import torch

from megatron_sorted.training.step import train_step as step
from tests.support.host_waits import HostWaits
from tests.support.layouts import PP2, thinned
from tests.support.measure_bodies import host_waits
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny

STEP = Path(step.__file__).read_text().splitlines()
NUMBER, LINE = next(
    (number, line.strip()) for number, line in enumerate(STEP, 1) if "is_bad, grad_norm" in line
)
ONCE = f"train_step.py:{NUMBER} {LINE}"
LAYOUTS = [
    (1, {}),
    (
        1,
        {
            "calculate_per_token_loss": False,
            "untie_exit_output_weights": True,
            "exit_sampling": "uniform",
        },
    ),
    (1, {"fp16": True, "loss_scale": 1024.0}),
    (2, {**PP2, "num_layers_per_virtual_pipeline_stage": 1}),
    (2, {**PP2, "exit_layer_weight_rule": "gradnorm", "exit_guard": True, "exit_guard_loss": 1.0}),
    (
        2,
        {
            **PP2,
            "num_layers_per_virtual_pipeline_stage": 1,
            "exit_layer_weight_rule": "simulated_exit",
            "layer_dropout": 0.3,
        },
    ),
    (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "bf16": True}),
    (
        2,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "lora_rank": 4,
            "dylora": True,
            "dylora_frozen": True,
        },
    ),
    (
        2,
        {
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
            "bf16": True,
        },
    ),
]


@pytest.mark.parametrize("track", thinned([False, True], True))
@pytest.mark.parametrize(("world_size", "changes"), LAYOUTS)
def test_a_step_waits_for_the_device_once_before_the_optimizer_steps(world_size, changes, track):
    for report in run_ranks(world_size, host_waits, tiny(**changes), track, True):
        assert report["step"] == [("tolist", ONCE)]
        assert report["report"], "a report waits, so a recorder that sees no wait does not work"


def test_the_recorder_sees_waits_in_forward_and_backward():
    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, d):
            d.sum().item()
            return d

    waits = HostWaits()
    x = torch.ones(3, requires_grad=True)
    waits.mark(x.data)
    host = torch.ones(3)
    with waits:
        int(host.sum()), host.nonzero(), torch.full((), 3, device="cpu"), host.tolist()
        assert waits.megatrons == []
        y = Waits.apply(2 * x)
        y.sum().backward()
        (
            bool(x.sum() > 1),
            y.nonzero(),
            y[y > 1],
            y.cpu(),
            torch.where(y > 1),
            float(y[0]),
            torch.tensor(1, device="cpu"),
        )
        y.data[[0, 1]], y.data[:2]
        y.data[:2], y.data[torch.arange(2, device="cpu")] = 1, 1
    assert [name for name, _ in waits.megatrons] == [
        "item",
        "__bool__",
        "nonzero",
        "__getitem__",
        "cpu",
        "where",
        "__float__",
        "tensor",
        "__getitem__",
        "__setitem__",
    ]
