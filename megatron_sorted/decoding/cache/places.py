"""Where new tokens stand and what they see: slots of the cache, positions, masks."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass
class Places:
    """Where the new tokens of a pass stand, the same for all its layers.

    Attributes:
        cos_bnd, sin_bnd: Of their rotations; the first half of ``sin`` is negated.
        span: Slots that any of them may see begin at 0 and end before this one.
        first: Slot of the first, where all rows stand alike in consecutive slots and see what is before them; else None.
        rows_b1, slots_bn: Their rows and slots, where ``first`` is None.
        positions_bn, key_positions_bs: Positions of the tokens and of the slots; needed for windows where ``first`` is None.
        seen_bns: Which slots they see, where ``first`` is None.
    """

    cos_bnd: Tensor
    sin_bnd: Tensor
    span: int
    first: int | None = None
    rows_b1: Tensor | None = None
    slots_bn: Tensor | None = None
    positions_bn: Tensor | None = None
    key_positions_bs: Tensor | None = None
    seen_bns: Tensor | None = None
    _masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    def attend(
        self, queries_bnhd: Tensor, keys_bgcd: Tensor, values_bgcd: Tensor, window: int | None
    ) -> Tensor:
        """Return what the tokens read from the cache; shape [b, n, h * d]."""
        b, n, heads, size = queries_bnhd.shape
        groups, start = keys_bgcd.size(1), 0
        if n == 1 and self.first is not None and window is not None:
            start = max(0, self.span - window)
        keys, values = keys_bgcd[:, :, start : self.span], values_bgcd[:, :, start : self.span]
        if self.first == 0 and n > 1 and (window is None or n <= window):
            said = scaled_dot_product_attention(
                queries_bnhd.transpose(1, 2),
                keys,
                values,
                is_causal=True,
                enable_gqa=heads != groups,
            )
            return said.transpose(1, 2).reshape(b, n, heads * size)
        # the queries that share a key are rows of one product: nothing is repeated
        share = heads // groups
        folded = (
            queries_bnhd.view(b, n, groups, share, size)
            .permute(0, 2, 3, 1, 4)
            .reshape(b, groups, share * n, size)
        )
        mask = None if n == 1 and self.first is not None else self._mask(window, n, share)
        said = scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
        return (
            said.view(b, groups, share, n, size).permute(0, 3, 1, 2, 4).reshape(b, n, heads * size)
        )

    def _mask(self, window: int | None, n: int, share: int) -> Tensor:
        """Return which slots are seen; [b or 1, 1, share * n, span]."""
        if (window, share) not in self._masks:
            if self.first is not None:
                keys = torch.arange(self.span, device=self.cos_bnd.device)
                tokens = keys[self.first : self.first + n, None]
                seen = (
                    keys <= tokens
                    if window is None
                    else (keys <= tokens) & (keys > tokens - window)
                )[None]
            else:
                seen = self.seen_bns
                if window is not None:
                    seen = seen & (
                        self.key_positions_bs[:, None] > self.positions_bn[:, :, None] - window
                    )
            mask = seen[:, None]
            if share > 1:
                mask = mask.expand(-1, share, -1, -1).reshape(mask.size(0), 1, share * n, -1)
            self._masks[window, share] = mask
        return self._masks[window, share]


def rotation_tables(
    rotary: torch.nn.Module, capacity: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cos and sin [capacity, d] of every position by transformers' own module, scaling included; half of sin negated."""
    positions = torch.arange(capacity, device=device)[None]
    cos, sin = rotary(torch.zeros(1, dtype=dtype, device=device), positions)
    sin = sin[0].clone()
    sin[:, : sin.size(1) // 2].neg_()
    return cos[0].clone(), sin
