"""Rotary position embedding: Megatron's, with the frequencies of `megatron_sorted.rotary`."""

import math

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from megatron_sorted.rotary import rotary_frequencies
from megatron_sorted.settings.rope_scaling import Rope, rope_of
from megatron_sorted.settings.run import Settings

STEEP = math.exp(10)
"""A factor for which 0.1 x mscale x ln(factor) + 1 is mscale + 1."""


class ScaledRotary(RotaryEmbedding):
    """Megatron's rotary embedding with the frequencies of a ``Rope``.

    Megatron-core's own YaRN has the same frequencies (a test compares them); it knows no rounded
    wavelengths, and rotates whole heads only.
    """

    def __init__(self, rope: Rope, cp_group: torch.distributed.ProcessGroup):
        super().__init__(rope.width, 1.0, rotary_base=rope.base, cp_group=cp_group)
        self.rope = rope

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Return the angles [tokens, width / 2] of a sample of this length; Megatron calls it.

        Dynamic scaling depends on the length: that of the whole sample, whatever documents it
        packs and however many context parallel ranks share it.
        """
        device = self.inv_freq.device
        positions = torch.arange(max_seq_len, dtype=torch.float32, device=device) + offset
        frequencies = rotary_frequencies(self.rope, max_seq_len + offset)
        return torch.outer(positions, frequencies.to(device))


def make_rotary(settings: Settings, groups: ProcessGroupCollection) -> RotaryEmbedding | None:
    """Build Megatron's rotary embedding with this model's frequencies.

    The result is None where positions are embedded by another method.
    """
    rope = rope_of(settings)
    return None if rope is None else ScaledRotary(rope, groups.cp)


def set_attention_factor(config: TransformerConfig, rope: Rope | None) -> None:
    """Let the layers of this configuration multiply cos and sin by ``rope.attention_factor``.

    Megatron's attention works the factor out (``_yarn_get_concentration_factor_from_config``) of
    attributes that Megatron-LM adds to the configuration for YaRN; some versions read them when a
    layer is built, others in each forward pass. Its fused kernels do not know the factor, so they
    are switched off beside it.
    """
    if rope is None or rope.attention_factor == 1.0:
        return
    config.yarn_rotary_scaling_factor = STEEP
    config.yarn_mscale = rope.attention_factor - 1.0
    config.yarn_mscale_all_dim = 0.0
    config.apply_rope_fusion = False
