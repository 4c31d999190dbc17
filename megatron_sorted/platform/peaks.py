"""Published peak rates of NVIDIA GPUs, by the name the driver gives them.

Dense matrix products (no structured sparsity) in 10^12 operations a second; half precision on tensor cores with fp32 sums, fp32
on ordinary cores, since torch leaves TF32 off unless told. A card missing here, or one that is shared out (MIG) or slowed down
(a laptop's), has no known peak; a user who knows it gives ``--device-peak-tflops``.
"""

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peak:
    """Rates of one card; bf16 is None where its tensor cores do not know it."""

    words: frozenset[str]
    bf16: float | None
    fp16: float
    fp32: float


def _card(words: str, half: float, fp32: float, has_bf16: bool = True) -> Peak:
    return Peak(frozenset(words.split()), half if has_bf16 else None, half, fp32)


# the first row whose words are all in the name; data sheets give half precision with sparsity, which is twice these
PEAKS = (
    _card("GB200", 2500, 80),  # GB200 NVL72 data sheet: 360 PFLOP/s sparse FP16 and 5,760 TFLOP/s FP32 by 72 GPUs
    _card("B200", 2250, 75),  # HGX B200 data sheet: 36 PFLOP/s sparse FP16 and 600 TFLOP/s FP32 by 8 GPUs
    _card("H200 NVL", 835.5, 60),  # H200 data sheet
    _card("H200", 989, 67),  # H200 data sheet, SXM
    _card("GH200", 989, 67),  # GH200 data sheet
    _card("H100 NVL", 835.5, 60),  # H100 data sheet
    _card("H100 PCIE", 756, 51),  # H100 PCIe product brief
    _card("H100 HBM3", 989, 67),  # H100 data sheet, SXM
    _card("H800 HBM3", 989, 67),  # as H100 SXM, with slower links
    _card("A100", 312, 19.5),  # A100 data sheet, SXM and PCIe
    _card("A800", 312, 19.5),  # as A100, with slower links
    _card("V100 SXM2", 125, 15.7, has_bf16=False),  # V100 data sheet
    _card("V100 PCIE", 112, 14, has_bf16=False),  # V100 data sheet
    _card("L40S", 362, 91.6),  # L40S data sheet
    _card("L40", 181, 90.5),  # L40 data sheet
    _card("L4", 121, 30.3),  # L4 data sheet
    _card("A40", 149.7, 37.4),  # A40 data sheet
    _card("A10", 125, 31.2),  # A10 data sheet
    _card("T4", 65, 8.1, has_bf16=False),  # T4 data sheet
    _card("RTX 4090", 165.2, 82.6),  # Ada architecture paper, appendix A
    _card("RTX 3090", 71, 35.6),  # GA102 architecture paper, appendix A
)


def peak_tflops_of(name: str, dtype: torch.dtype) -> float | None:
    """Returns the peak of the GPU called ``name`` for ``dtype``; None if it is not known."""
    words = set(re.findall(r"[A-Z0-9]+", re.sub(r"(SXM|HBM)(\d)E\b", r"\1\2", name.upper())))
    if words & {"MIG", "LAPTOP", "TI", "D"}:
        return None
    for peak in PEAKS:
        if peak.words <= words:
            return {torch.bfloat16: peak.bf16, torch.float16: peak.fp16, torch.float32: peak.fp32}.get(dtype)
    return None
