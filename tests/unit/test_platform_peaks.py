"""Peak rates by the names that drivers give."""

import pytest
import torch

from megatron_sorted.platform.cpu import CpuPlatform
from megatron_sorted.platform.peaks import peak_tflops_of

NAMES = [
    ("NVIDIA H200", 989, 67), ("NVIDIA H100 80GB HBM3", 989, 67), ("NVIDIA H100 PCIe", 756, 51),
    ("NVIDIA H100 NVL", 835.5, 60),
    ("NVIDIA GH200 480GB", 989, 67), ("NVIDIA B200", 2250, 75), ("NVIDIA GB200", 2500, 80),
    ("NVIDIA A100-SXM4-80GB", 312, 19.5), ("NVIDIA A100 80GB PCIe", 312, 19.5),
    ("A100-PCIE-40GB", 312, 19.5), ("NVIDIA A10", 125, 31.2), ("NVIDIA L40S", 362, 91.6),
    ("NVIDIA L40", 181, 90.5), ("NVIDIA L4", 121, 30.3), ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ("Tesla V100-SXM2-32GB", None, 15.7), ("Tesla V100-PCIE-16GB", None, 14),
    ("Tesla T4", None, 8.1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "bf16", "fp32"), NAMES)
def test_known_cards(name, bf16, fp32):
    assert (
        peak_tflops_of(name, torch.bfloat16) == bf16 and peak_tflops_of(name, torch.float32) == fp32
    )
    assert peak_tflops_of(name, torch.float16) == (
        bf16 or {"S": 125, "P": 112, "T": 65}[name.split("-")[1][0] if "-" in name else "T"]
    )


@pytest.mark.parametrize("name", [
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D", "NVIDIA A100X", "NVIDIA A10G", "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA H20", "NVIDIA H100 80GB HBM2e", "AMD Instinct MI300X", "Tesla V100-SXM3-32GB", "",
])  # fmt: skip
def test_unknown_cards_have_no_peak(name):
    assert (
        peak_tflops_of(name, torch.bfloat16) is None and peak_tflops_of(name, torch.float32) is None
    )


@pytest.mark.parametrize(("name", "bf16"), [
    ("Ascend910B1", 373.9), ("Ascend910B2", 353.9), ("Ascend910B2C", 353.9), ("Ascend910B3", 294.9),
    ("Ascend910B4", 245.8), ("Ascend910B4-1", 245.8), ("Ascend910_9392", 353.9),
    ("Ascend910A", None), ("Ascend910B", None), ("Ascend910ProB", None),
])  # fmt: skip
def test_npus(name, bf16):
    assert peak_tflops_of(name, torch.bfloat16) == bf16
    assert (
        peak_tflops_of(name, torch.float16) == (bf16 or 256)
        and peak_tflops_of(name, torch.float32) is None
    )


def test_unknown_kinds_of_number_and_the_cpu_have_no_peak():
    assert peak_tflops_of("NVIDIA H200", torch.float64) is None
    assert CpuPlatform().peak_tflops(torch.float32) is None
