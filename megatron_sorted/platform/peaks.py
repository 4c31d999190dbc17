"""The published peak rate of a device for a data type of torch."""

import torch

from megatron_sorted.device_rates import peak_rates_of


def peak_tflops_of(name: str, dtype: torch.dtype) -> float | None:
    """Return the peak of the device called ``name`` for ``dtype``; None if it is unknown.

    A user who knows it gives ``--device-peak-tflops``.
    """
    rates = peak_rates_of(name)
    if rates is None:
        return None
    return {torch.bfloat16: rates.bf16, torch.float16: rates.fp16, torch.float32: rates.fp32}.get(
        dtype
    )
