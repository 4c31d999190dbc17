"""Fused operations of Ascend NPUs, by torch_npu; --npu-kernels can leave each of them out."""

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch.utils.weak import WeakIdKeyDictionary

from megatron_sorted.platform.kernels import FusedKernels

CAUSAL, WHOLE_MASK = 2, 1
"""Sparse modes of npu_fusion_attention."""

CAUSAL_MASK_TOKENS = 2048
"""Side of the causal mask that npu_fusion_attention takes for sequences of every length."""

# {mask: where it hides}, since all layers use the same mask
_hidden = WeakIdKeyDictionary()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Apply npu_rms_norm; see ``FusedKernels``."""
    import torch_npu

    return torch_npu.npu_rms_norm(x, weight, epsilon=epsilon)[0]


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """Apply npu_swiglu; see ``FusedKernels``."""
    import torch_npu

    return torch_npu.npu_swiglu(x, dim=-1)


def rotary(x_sbnd: torch.Tensor, angles_s11d: torch.Tensor) -> torch.Tensor:
    """Apply npu_rotary_mul to the dimensions that have angles; see ``FusedKernels``."""
    import torch_npu

    turned, rest = x_sbnd[..., : angles_s11d.size(-1)], x_sbnd[..., angles_s11d.size(-1) :]
    cosines, sines = (f(angles_s11d).to(x_sbnd.dtype) for f in (torch.cos, torch.sin))
    turned = torch_npu.npu_rotary_mul(turned.contiguous(), cosines, sines)
    return torch.cat((turned, rest), dim=-1) if rest.size(-1) else turned


@lru_cache(maxsize=1)
def _causal_mask(device: torch.device) -> torch.Tensor:
    """Return the fixed mask of sparse mode 2, True where a token may not attend."""
    ones = torch.ones(CAUSAL_MASK_TOKENS, CAUSAL_MASK_TOKENS, dtype=torch.bool, device=device)
    return ones.triu(1)


def _hidden_by(mask: torch.Tensor) -> torch.Tensor:
    """Return the mask that npu_fusion_attention takes: True where a token may not attend.

    ``mask`` is boolean, True where a token may attend, or additive.
    """
    if mask not in _hidden:
        _hidden[mask] = ~mask if mask.dtype == torch.bool else mask != 0
    return _hidden[mask]


def attention(
    query_sbnd: torch.Tensor,
    key_sbgd: torch.Tensor,
    value_sbgd: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Apply npu_fusion_attention; see ``FusedKernels``.

    Causal attention needs no mask of the sequence's size; packed documents and windows need one.
    """
    import torch_npu

    if mask is None:
        options = {
            "atten_mask": _causal_mask(query_sbnd.device),
            "sparse_mode": CAUSAL,
            "pre_tockens": 2**31 - 1,
            "next_tockens": 0,
        }
    else:
        options = {"atten_mask": _hidden_by(mask), "sparse_mode": WHOLE_MASK}
    query, key, value = (x.flatten(-2) for x in (query_sbnd, key_sbgd, value_sbgd))
    return torch_npu.npu_fusion_attention(
        query, key, value, query_sbnd.size(2), "SBH", scale=scale, keep_prob=1.0, **options
    )[0]


KERNELS = {"rms_norm": rms_norm, "swiglu": swiglu, "rotary": rotary, "attention": attention}


def chosen_kernels(names: Iterable[str]) -> FusedKernels:
    """Return the fused operations in ``names``: any of rms_norm, swiglu, rotary and attention."""
    return FusedKernels(**{name: KERNELS[name] for name in names})
