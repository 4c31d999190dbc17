"""Attention by torch's scaled_dot_product_attention.

It needs less memory and time than unfused products on every device.
"""

import math
from functools import lru_cache

import torch
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch.nn.functional import scaled_dot_product_attention

from megatron_sorted.platform.kernels import fused_kernels
from megatron_sorted.platform.state import random_tracker


class SdpaAttention(MegatronModule):
    """Core attention of Megatron's local layers.

    Shapes: query [s, b, n, d], key and value [s, b, g, d] (g divides n), attention_mask
    [b or 1, 1, s, s] with True or 0 where a query may attend (any mask that
    scaled_dot_product_attention takes), or None for plain causal attention; result [s, b, n*d].
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        cp_comm_type=None,
        **_process_groups,
    ):
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query,
        key,
        value,
        attention_mask,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
    ):
        """Return the attention output; see the class."""
        assert attention_bias is None and packed_seq_params is None, (
            "local attention takes a mask, not a bias or packed lengths"
        )
        dropout = self.dropout if self.training else 0.0
        fused = fused_kernels().attention
        if fused is not None and dropout == 0.0:
            return fused(query, key, value, attention_mask, self.softmax_scale)
        query_bnsd, key_bgsd, value_bgsd = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        options = {
            "attn_mask": attention_mask,
            "is_causal": attention_mask is None,
            "dropout_p": dropout,
            "scale": self.softmax_scale,
            "enable_gqa": query.size(2) != key.size(2),
        }
        if dropout > 0.0 and not self.config.sequence_parallel:
            # heads differ between tensor parallel ranks, so their dropout must too
            with random_tracker().fork():
                context_bnsd = scaled_dot_product_attention(
                    query_bnsd, key_bgsd, value_bgsd, **options
                )
        else:
            context_bnsd = scaled_dot_product_attention(query_bnsd, key_bgsd, value_bgsd, **options)
        return context_bnsd.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)


def make_attention_mask(
    tokens_bs: torch.Tensor, pieces_bs: torch.Tensor | None, window: int | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return the additive mask of packed documents and a sliding window, or None for neither.

    Plain causal attention needs no mask. The mask is a float tensor, because a boolean one would be
    converted again in every layer.

    Shapes: result [b or 1, 1, s, s], 0 where a token may attend and -inf elsewhere.

    Args:
        tokens_bs: Tokens of the micro-batch, for length and device.
        pieces_bs: Number of the document that each token belongs to; None where every sample is
            one document.
        window: Number of tokens that a token may attend to, itself included; None for all before
            it.
        dtype: Dtype of the mask.
    """
    length = tokens_bs.size(1)
    window = length if window is None else min(window, length)
    if pieces_bs is None:
        return None if window == length else _window_mask(length, window, dtype, tokens_bs.device)
    same = pieces_bs[:, None, :, None] == pieces_bs[:, None, None, :]
    mask = torch.zeros(same.shape, dtype=dtype, device=pieces_bs.device)
    return mask.masked_fill_(~(same & _visible(length, window, pieces_bs.device)), float("-inf"))


def _visible(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Return whether token i may attend to token j: i - window < j <= i; shape [s, s].

    This is transformers' sliding-window attention.
    """
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


@lru_cache(maxsize=2)
def _window_mask(
    length: int, window: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return the mask [1, 1, s, s] of a window without packing, cached for all micro-batches."""
    mask = torch.zeros(1, 1, length, length, dtype=dtype, device=device)
    return mask.masked_fill_(~_visible(length, window, device), float("-inf"))
