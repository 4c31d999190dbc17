"""The layout table on NPUs, against the same references on the CPU: rows of every kind, with the device's fused operations."""

import pytest

from tests.ranks.test_layouts import LAYOUTS, compare
from tests.ranks.test_precision import BF16_GRADIENT, BF16_LOSS, check_against_reference
from tests.support.layouts import PP2, SEQUENCE, thinned
from tests.support.tiny import tiny

pytestmark = pytest.mark.npu
NPU = {"device": "npu", "exit_loss_chunk_tokens": 32}
FP32 = 1e-5  # as on the CPU
EVERYDAY = (
    "one process", "tp2 sequence parallel untied own", "dp2 distributed overlap", "pp2 chunks2 own selective", "pp4 untied full recompute",
    "tp2 pp2", "pp2 dp2 distributed overlap untied")


@pytest.mark.parametrize("name", thinned(LAYOUTS, *EVERYDAY))
def test_layout_equals_reference(name):
    world_size, changes = LAYOUTS[name]
    compare(world_size, tiny(**changes, **NPU), FP32)


def test_packed_documents_with_few_trained_tokens():
    compare(1, tiny(**NPU), FP32, unequal=True, packed=True)


def test_torchs_own_norm_rotary_and_swiglu():
    compare(1, tiny(**NPU, npu_kernels=("attention",)), FP32)  # torch_npu's own attention for torch's is not simulated


@pytest.mark.parametrize(("world_size", "changes"), [
    (1, {}), (2, SEQUENCE), (4, {**PP2, "use_distributed_optimizer": True, "untie_embeddings_and_output_weights": True})])
def test_bf16(world_size, changes):
    check_against_reference(world_size, tiny(bf16=True, **changes, **NPU), BF16_LOSS, BF16_GRADIENT)


def test_fp16_with_loss_scale():
    check_against_reference(2, tiny(fp16=True, loss_scale=1024.0, **PP2, **NPU), 1e-3, 1e-2)
