"""Published peak rates of NVIDIA GPUs and Ascend NPUs, by the name the driver gives them.

Dense matrix products (no structured sparsity) in 10^12 operations a second; half precision on tensor cores with fp32 sums, fp32
on ordinary cores, since torch leaves TF32 off unless told. A card missing here, or one that is shared out (MIG) or slowed down
(a laptop's), has no known peak; a user who knows it gives ``--device-peak-tflops``.
"""

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peak:
    """Rates of one card; None where its cores do not know the kind of number, or no rate is published."""

    words: frozenset[str]
    bf16: float | None
    fp16: float
    fp32: float | None


def _card(words: str, half: float, fp32: float | None, has_bf16: bool = True) -> Peak:
    return Peak(frozenset(words.split()), half if has_bf16 else None, half, fp32)


# the first row whose words are all in the name; data sheets give half precision with sparsity, which is twice these
PEAKS = (
    _card(
        "GB200", 2500, 80
    ),  # GB200 NVL72 data sheet: 360 PFLOP/s sparse FP16 and 5,760 TFLOP/s FP32 by 72 GPUs
    _card(
        "B200", 2250, 75
    ),  # HGX B200 data sheet: 36 PFLOP/s sparse FP16 and 600 TFLOP/s FP32 by 8 GPUs
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
    # Ascend: bf16 as torchtitan's Ascend forks list it; a 910C is two dies, each of which is a device, called 910_93xx
    _card("ASCEND910B1", 373.9, None),
    _card("ASCEND910B2", 353.9, None),
    _card("ASCEND910B2C", 353.9, None),
    _card("ASCEND910B3", 294.9, None),
    _card("ASCEND910B4", 245.8, None),
    *(
        _card(f"ASCEND910 {die}", 353.9, None)
        for die in ("9362", "9363", "9372", "9381", "9382", "9391", "9392")
    ),
    # the first generation: 256 TFLOP/s fp16, no bf16; without a digit behind it, B is one of its kinds
    *(
        _card(f"ASCEND910{kind}", 256, None, has_bf16=False)
        for kind in ("A", "B", "PROA", "PROB", "PREMIUMA")
    ),
)


def peak_tflops_of(name: str, dtype: torch.dtype) -> float | None:
    """Return the peak of the device called ``name`` for ``dtype``; None if it is not known."""
    words = set(re.findall(r"[A-Z0-9]+", re.sub(r"(SXM|HBM)(\d)E\b", r"\1\2", name.upper())))
    if words & {"MIG", "LAPTOP", "TI", "D"}:
        return None
    for peak in PEAKS:
        if peak.words <= words:
            return {
                torch.bfloat16: peak.bf16,
                torch.float16: peak.fp16,
                torch.float32: peak.fp32,
            }.get(dtype)
    return None
