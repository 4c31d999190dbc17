"""Published peak rates of NVIDIA GPUs and Ascend NPUs, by the name the driver gives them.

Dense matrix products (no structured sparsity) in 10^12 operations a second; half precision on
tensor cores with fp32 sums, fp32 on ordinary cores, since torch leaves TF32 off by default. A
device that is missing here, or shared (MIG) or slower (a laptop's), has no known peak.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class PeakRates:
    """Rates of one device; None where it lacks the data type, or no rate is published."""

    name_parts: frozenset[str]
    bf16: float | None
    fp16: float
    fp32: float | None


def _rates(name: str, half: float, fp32: float | None, has_bf16: bool = True) -> PeakRates:
    return PeakRates(frozenset(name.split()), half if has_bf16 else None, half, fp32)


# Data sheets give half precision with sparsity, which is twice these.
PEAKS = (
    # GB200 NVL72 data sheet: 360 PFLOP/s sparse FP16 and 5,760 TFLOP/s FP32 by 72 GPUs
    _rates("GB200", 2500, 80),
    # HGX B200 data sheet: 36 PFLOP/s sparse FP16 and 600 TFLOP/s FP32 by 8 GPUs
    _rates("B200", 2250, 75),
    _rates("H200 NVL", 835.5, 60),  # H200 data sheet
    _rates("H200", 989, 67),  # H200 data sheet, SXM
    _rates("GH200", 989, 67),  # GH200 data sheet
    _rates("H100 NVL", 835.5, 60),  # H100 data sheet
    _rates("H100 PCIE", 756, 51),  # H100 PCIe product brief
    _rates("H100 HBM3", 989, 67),  # H100 data sheet, SXM
    _rates("H800 HBM3", 989, 67),  # as H100 SXM, with slower links
    _rates("A100", 312, 19.5),  # A100 data sheet, SXM and PCIe
    _rates("A800", 312, 19.5),  # as A100, with slower links
    _rates("V100 SXM2", 125, 15.7, has_bf16=False),  # V100 data sheet
    _rates("V100 PCIE", 112, 14, has_bf16=False),  # V100 data sheet
    _rates("L40S", 362, 91.6),  # L40S data sheet
    _rates("L40", 181, 90.5),  # L40 data sheet
    _rates("L4", 121, 30.3),  # L4 data sheet
    _rates("A40", 149.7, 37.4),  # A40 data sheet
    _rates("A10", 125, 31.2),  # A10 data sheet
    _rates("T4", 65, 8.1, has_bf16=False),  # T4 data sheet
    _rates("RTX 4090", 165.2, 82.6),  # Ada architecture paper, appendix A
    _rates("RTX 3090", 71, 35.6),  # GA102 architecture paper, appendix A
    # Ascend: bf16 from torchtitan's Ascend forks. Each of the two dies of a 910C is a device,
    # called 910_93xx.
    _rates("ASCEND910B1", 373.9, None),
    _rates("ASCEND910B2", 353.9, None),
    _rates("ASCEND910B2C", 353.9, None),
    _rates("ASCEND910B3", 294.9, None),
    _rates("ASCEND910B4", 245.8, None),
    *(
        _rates(f"ASCEND910 {die}", 353.9, None)
        for die in ("9362", "9363", "9372", "9381", "9382", "9391", "9392")
    ),
    # The first generation: 256 TFLOP/s fp16, no bf16; without a digit after it, B is one of its
    # kinds.
    *(
        _rates(f"ASCEND910{kind}", 256, None, has_bf16=False)
        for kind in ("A", "B", "PROA", "PROB", "PREMIUMA")
    ),
)
"""Peak rates; a device has those of the first row whose parts are all in its name."""


def peak_rates_of(name: str) -> PeakRates | None:
    """Return the peak rates of the device called ``name``; None if they are unknown.

    >>> peak_rates_of("NVIDIA H100 80GB HBM3").bf16
    989
    """
    parts = set(re.findall(r"[A-Z0-9]+", re.sub(r"(SXM|HBM)(\d)E\b", r"\1\2", name.upper())))
    if parts & {"MIG", "LAPTOP", "TI", "D"}:
        return None
    return next((peak for peak in PEAKS if peak.name_parts <= parts), None)
