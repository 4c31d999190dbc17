"""Rotary position embedding: Megatron's, with a scaling that extends models to longer contexts."""

import math

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sorted.settings.derived import kv_channels
from megatron_sorted.settings.run import Settings


def stretch_low_frequencies(
    frequencies: torch.Tensor, factor: float, low: float, high: float, context_tokens: int
) -> torch.Tensor:
    """Return rotary frequencies with those that turn little within ``context_tokens`` reduced.

    A frequency that turns less than ``low`` times within the context is divided by ``factor``, one
    that turns more than ``high`` times stays, and between the two it is interpolated linearly in
    the number of turns.

    Source: the rotary scaling of Llama 3.1 ("The Llama 3 Herd of Models", arXiv 2407.21783, and
        ``apply_scaling`` in Meta's llama-models), which transformers calls rope_type "llama3".
        Megatron-core has it for one choice of the last three numbers only.

    Args:
        frequencies: Angles per token, in radians.
        factor: Divisor of the lowest frequencies.
        low: Turns within the context below which a frequency is divided by ``factor``.
        high: Turns within the context above which a frequency stays.
        context_tokens: Length of the context that the model was first trained with.
    """
    turns = context_tokens * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept) * frequencies / factor + kept * frequencies


def make_rotary(settings: Settings, groups: ProcessGroupCollection) -> RotaryEmbedding | None:
    """Build Megatron's rotary embedding with this model's frequencies.

    The result is None where positions are embedded by another method.
    """
    if settings.position_embedding_type != "rope":
        return None
    rotary = RotaryEmbedding(
        kv_channels=kv_channels(settings),
        rotary_percent=settings.rotary_percent,
        rotary_base=settings.rotary_base,
        seq_len_interpolation_factor=settings.rotary_seq_len_interpolation_factor,
        cp_group=groups.cp,
    )
    if settings.use_rope_scaling:
        rotary.inv_freq = stretch_low_frequencies(
            rotary.inv_freq,
            settings.rope_scaling_factor,
            settings.rope_scaling_low_freq_factor,
            settings.rope_scaling_high_freq_factor,
            settings.rope_scaling_original_max_position_embeddings,
        )
    return rotary
