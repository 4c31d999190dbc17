"""The positions, cache slots and attention masks of new tokens."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_sorted.rotary import rotary_frequencies
from megatron_sorted.settings.rope_scaling import Rope


@dataclass
class Places:
    """The positions, cache slots and attention masks of the new tokens of a forward pass.

    They are the same for all its layers. There are two forms. If the new tokens of every row fill
    the same consecutive slots and attend to all earlier ones, ``first`` is enough. Else it is None
    and the later attributes are set.

    Attributes:
        cos_bn12f, sin_bn12f: Rotary embeddings of both halves of a head; the first half of ``sin``
            is negated.
        span: End of the slots that any of the tokens may attend to; they begin at 0.
        first: Slot of the first new token.
        rows_b1, slots_bn: Rows and slots of the new tokens.
        positions_bn, key_positions_bs: Positions of the tokens and of the slots, for windows.
        seen_bns: Whether a token attends to a slot.
    """

    cos_bn12f: Tensor
    sin_bn12f: Tensor
    span: int
    first: int | None = None
    rows_b1: Tensor | None = None
    slots_bn: Tensor | None = None
    positions_bn: Tensor | None = None
    key_positions_bs: Tensor | None = None
    seen_bns: Tensor | None = None
    _masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Return the number of new tokens of a row."""
        return self.cos_bn12f.size(1)

    def attend(self, queries_bnhd: Tensor, kv_2bgcd: Tensor, window: int | None) -> Tensor:
        """Return the attention of the new tokens to the cache, [b * n, h * d]."""
        b, n, heads, size = queries_bnhd.shape
        groups, start = kv_2bgcd.size(2), 0
        if n == 1 and self.first is not None and window is not None:
            start = max(0, self.span - window)
        keys, values = kv_2bgcd.narrow(3, start, self.span - start).unbind()
        causal = self.first == 0 and n > 1 and (window is None or n <= window)
        # the queries that share a key are rows of one product, so that no key is repeated; a whole
        # prompt needs no mask in exchange
        share = 1 if causal else heads // groups
        if share == 1:
            queries = queries_bnhd.transpose(1, 2)
        elif n == 1:
            queries = queries_bnhd.view(b, groups, share, size)
        else:
            folded = queries_bnhd.view(b, n, groups, share, size).permute(0, 2, 3, 1, 4)
            queries = folded.reshape(b, groups, share * n, size)
        mask = (
            None if causal or (n == 1 and self.first is not None) else self._mask(window, n, share)
        )
        attended = scaled_dot_product_attention(
            queries, keys, values, mask, is_causal=causal, enable_gqa=causal and heads != groups
        )
        if n > 1:
            unfolded = attended.view(b, heads // share, share, n, size)
            attended = unfolded.permute(0, 3, 1, 2, 4)
        return attended.reshape(b * n, heads * size)

    def _mask(self, window: int | None, n: int, share: int) -> Tensor:
        """Return the attention mask, [b or 1, 1, share * n, span]."""
        if (window, share) not in self._masks:
            if self.first is None:
                seen, keys_bs, tokens_bn = self.seen_bns, self.key_positions_bs, self.positions_bn
            else:
                keys_bs = torch.arange(self.span, device=self.cos_bn12f.device)[None]
                tokens_bn = keys_bs[:, self.first : self.first + n]
                seen = keys_bs[:, None] <= tokens_bn[:, :, None]
            if window is not None:
                seen = seen & (keys_bs[:, None] > tokens_bn[:, :, None] - window)
            mask = seen[:, None]
            if share > 1:
                mask = mask.expand(-1, share, -1, -1).reshape(mask.size(0), 1, share * n, -1)
            self._masks[window, share] = mask
        return self._masks[window, share]


def rotation_tables(
    rope: Rope, capacity: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Compute cos and sin [capacity, d] of every position.

    Scaling is included; the first half of ``sin`` is negated. Where the frequencies depend on the
    length of the text, they are those of texts up to ``rope.constant_tokens``.
    """
    positions = torch.arange(capacity, dtype=torch.float32, device=device)
    angles = torch.outer(positions, rotary_frequencies(rope, 1).to(device)).repeat(1, 2)
    cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
    sin[:, : sin.size(1) // 2].neg_()
    return cos.to(dtype), sin.to(dtype)


def halves(table_bnd: Tensor) -> Tensor:
    """Return rotary embeddings as `Places` holds them."""
    b, n, size = table_bnd.shape
    return table_bnd.view(b, n, 1, 2, size // 2)
