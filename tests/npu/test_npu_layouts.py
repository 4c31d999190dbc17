"""The layout table on NPUs, in fp32 and bf16, with the device's fused operations.

The references are computed in fp32 on the CPU.
"""

import pytest

from tests.ranks.test_fsdp import LAYOUTS as SHARDED
from tests.ranks.test_layouts import LAYOUTS, compare
from tests.ranks.test_precision import BF16_GRADIENT, BF16_LOSS, check_against_reference
from tests.support.layouts import FSDP, PP2, thinned
from tests.support.tiny import tiny

pytestmark = pytest.mark.npu
NPU = {"device": "npu", "exit_loss_chunk_tokens": 32}
FP32 = 1e-5  # as on the CPU
EVERYDAY = (
    "one process",
    "tp2 sequence parallel",
    "tp2 sequence parallel untied own",
    "dp2 distributed overlap",
    "pp2 chunks2 own selective",
    "pp4 untied full recompute",
    "tp2 pp2",
    "pp2 dp2 distributed",
    "pp2 dp2 distributed overlap untied",
)
EVERYDAY_SHARDED = ("dp2 own", "dp4 untied full recompute")


@pytest.mark.parametrize("name", thinned(LAYOUTS, *EVERYDAY))
def test_layout_equals_reference(name):
    world_size, changes = LAYOUTS[name]
    compare(world_size, tiny(**changes, **NPU), FP32)


def test_packed_documents_with_few_trained_tokens():
    compare(1, tiny(**NPU), FP32, unequal=True, packed=True)


def test_torchs_own_norm_rotary_and_swiglu():
    compare(
        1, tiny(**NPU, npu_kernels=("attention",)), FP32
    )  # torch_npu's own attention for torch's is not simulated


@pytest.mark.parametrize("name", thinned(LAYOUTS, *EVERYDAY))
def test_layout_equals_reference_in_bf16(name):
    world_size, changes = LAYOUTS[name]
    check_against_reference(world_size, tiny(bf16=True, **changes, **NPU), BF16_LOSS, BF16_GRADIENT)


@pytest.mark.parametrize("name", thinned(SHARDED, *EVERYDAY_SHARDED))
def test_fully_sharded_layout_equals_reference(name):
    world_size, changes = SHARDED[name]
    compare(world_size, tiny(**FSDP, **changes, **NPU), FP32)


@pytest.mark.parametrize("name", thinned(SHARDED, *EVERYDAY_SHARDED))
def test_fully_sharded_layout_equals_reference_in_bf16(name):
    world_size, changes = SHARDED[name]
    check_against_reference(
        world_size, tiny(bf16=True, **FSDP, **changes, **NPU), BF16_LOSS, BF16_GRADIENT
    )


@pytest.mark.parametrize("name", ["dp2 overlap untied", "pp2 dp2 distributed overlap untied"])
def test_collectives_one_by_one(name):
    world_size, changes = LAYOUTS[name]
    compare(world_size, tiny(**changes, **NPU, npu_coalesced_collectives=False), FP32)


def test_fp16_with_loss_scale():
    check_against_reference(2, tiny(fp16=True, loss_scale=1024.0, **PP2, **NPU), 1e-3, 1e-2)
