"""Rotary frequencies of a network: the one function that training, decoding and conversion use."""

import math

import torch
from torch import Tensor

from megatron_sorted.settings.rope_scaling import Rope


def rotary_frequencies(rope: Rope, tokens: int) -> Tensor:
    """Return the rotation of each pair of channels from one token to the next [width / 2].

    In radians and fp32, on the CPU. Each type takes the operations of transformers in their order,
    so that the numbers are equal bit for bit: at position 30,000 an error of the last bit turns a
    fast channel by 0.002. Cos and sin are multiplied by ``rope.attention_factor``.

    Source: RoPE (arXiv 2104.09864, eq. 15); linear: arXiv 2306.15595; dynamic:
        transformers, whose base grows with the text; yarn: arXiv 2309.00071, eq. 17 to 20; llama3:
        arXiv 2407.21783 and ``apply_scaling`` in Meta's llama-models; longrope: arXiv 2402.13753;
        resonance: arXiv 2403.00071, eq. 5.

    Args:
        rope: The rotary positions.
        tokens: Length of the text, which dynamic and longrope depend on.
    """
    if not rope.resonance:
        return _scaled(rope, tokens, torch.float32)
    return _divided(rope, resonance_divisors(rope, tokens))


def resonance_divisors(rope: Rope, tokens: int) -> tuple[float, ...]:
    """Return the divisors of the plain frequencies that round wavelengths to whole tokens.

    The wavelength of a (scaled) frequency f is 2 pi / f tokens. Wavelengths are computed in fp64:
    near half a token fp32 could round a long one either way. The powers of the base are those that
    are divided, in fp32, so that their rounding error has no effect.
    """
    wavelengths = torch.round(2 * math.pi / _scaled(rope, tokens, torch.float64))
    powers = _powers(rope.base, rope.width, torch.float32).double()
    return tuple((wavelengths / (2 * math.pi * powers)).tolist())


def _powers(base: float | Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return base ** (torch.arange(0, width, 2, dtype=torch.int64, device="cpu").to(dtype) / width)


def _divided(rope: Rope, divisors: tuple[float, ...]) -> Tensor:
    """Return the plain frequencies divided by these numbers, as longrope divides them."""
    divisors = torch.tensor(divisors, dtype=torch.float32, device="cpu")
    return 1.0 / (divisors * _powers(rope.base, rope.width, torch.float32))


def _scaled(rope: Rope, tokens: int, dtype: torch.dtype) -> Tensor:
    """Return the scaled frequencies before their wavelengths are rounded."""
    if rope.kind == "longrope":
        return _divided(rope, rope.long if tokens > rope.context else rope.short).to(dtype)
    base: float | Tensor = rope.base
    if rope.kind == "dynamic" and tokens > rope.context:
        # a tensor, as transformers computes it from the positions
        length = torch.tensor(tokens, device="cpu") if dtype == torch.float32 else tokens
        grown = (rope.factor * length / rope.context) - (rope.factor - 1)
        base = base * grown ** (rope.width / (rope.width - 2))
    powers = _powers(base, rope.width, dtype)
    plain = 1.0 / powers
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        kept = 1 - _yarn_ramp(rope, dtype)
        return 1.0 / (rope.factor * powers) * (1 - kept) + plain * kept
    return plain


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Return the frequencies with those that turn little within the context reduced."""
    wavelengths = 2 * math.pi / plain
    is_low = wavelengths > rope.context / rope.low
    scaled = torch.where(is_low, plain / rope.factor, plain)
    kept = (rope.context / wavelengths - rope.low) / (rope.high - rope.low)
    between = (1 - kept) * scaled / rope.factor + kept * scaled
    is_between = ~(wavelengths < rope.context / rope.high) & ~is_low
    return torch.where(is_between, between, scaled)


def _yarn_ramp(rope: Rope, dtype: torch.dtype) -> Tensor:
    """Return how far each frequency is divided: 0 not at all, 1 by the whole factor.

    It grows linearly between the channel whose frequency turns ``beta_fast`` times within the
    context and the one that turns ``beta_slow`` times.
    """

    def channel(turns: float) -> float:
        ratio = rope.context / (turns * 2 * math.pi)
        return rope.width * math.log(ratio) / (2 * math.log(rope.base))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.width - 1)
    if low == high:
        high += 0.001  # as transformers and Megatron-core: no division by 0
    steps = (torch.arange(rope.width // 2, dtype=dtype, device="cpu") - low) / (high - low)
    return steps.clamp(0, 1)
