"""A decoder layer of the LLaMA family in few operations: joined matrices, KV cache in place.

Where a pass has few tokens, its time is that of its matrices and of the host, which starts every
operation. So tensors stay two-dimensional where they can, and are changed in place where they are
the layer's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_sorted.decoding.cache.matrix import Matrices
from megatron_sorted.decoding.cache.norm import RmsNorm
from megatron_sorted.decoding.cache.places import Places
from megatron_sorted.platform.fused import kernels_of

SILU = ("SiLU", "SiLUActivation")
"""Names of the activation for which devices have a fused operation."""


@dataclass(frozen=True)
class KVCache:
    """The keys and values of one layer, in memory that stays where it is.

    Attributes:
        both: Keys and values, [2, b, groups, capacity, d].
    """

    both: Tensor

    @property
    def keys(self) -> Tensor:
        """Return the keys, [b, groups, capacity, d]."""
        return self.both[0]

    @property
    def values(self) -> Tensor:
        """Return the values, [b, groups, capacity, d]."""
        return self.both[1]

    def write(self, places: Places, new_bn2gd: Tensor) -> None:
        """Store the keys and values of the tokens at ``places``."""
        if places.first is not None:
            slots = self.both.narrow(3, places.first, new_bn2gd.size(1))
            slots.copy_(new_bn2gd.permute(2, 0, 3, 1, 4))
        else:
            self.both[:, places.rows_b1, :, places.slots_bn] = new_bn2gd


class Layer:
    """A decoder layer of transformers (Llama, Mistral, Qwen2, Qwen3) with joined matrices.

    The module stays usable: its matrices become views of the joined ones.

    Args:
        module: The transformers layer.
        matrices: Factory of its matrices.
        window: Attention window; None without limit.
    """

    def __init__(self, module: nn.Module, matrices: Matrices, window: int | None = None):
        attention, mlp = module.self_attn, module.mlp
        self.head_size, self.window = attention.head_dim, window
        self.num_heads = attention.q_proj.out_features // self.head_size
        self.num_groups = attention.k_proj.out_features // self.head_size
        self.first_norm = RmsNorm.of(module.input_layernorm)
        self.second_norm = RmsNorm.of(module.post_attention_layernorm)
        self.qkv = matrices.joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self.gate_up = matrices.joined([mlp.gate_proj, mlp.up_proj])
        self.out, self.down = matrices.of(attention.o_proj), matrices.of(mlp.down_proj)
        self.activation = mlp.act_fn
        is_silu = type(mlp.act_fn).__name__ in SILU
        self.swiglu = kernels_of(attention.q_proj.weight.device).swiglu if is_silu else None
        self.qk_norm = None
        if hasattr(attention, "q_norm"):
            both = [
                attention.q_norm.weight.expand(self.num_heads, -1),
                attention.k_norm.weight.expand(self.num_groups, -1),
            ]
            self.qk_norm = RmsNorm(torch.cat(both), attention.q_norm.variance_epsilon)

    def __call__(self, hidden_th: Tensor, places: Places, cache: KVCache) -> Tensor:
        """Return the new tokens' hidden state after the layer, and write ``cache``.

        Args:
            hidden_th: Hidden states of the tokens, row by row.
            places: Places of the tokens.
            cache: Keys and values of the layer.
        """
        return self.run(hidden_th, [(places, cache)])

    def run(
        self, hidden_th: Tensor, texts: Sequence[tuple[Places, KVCache]], rows: int | None = None
    ) -> Tensor:
        """Return the new tokens' hidden state after the layer, and write the caches of all texts.

        Args:
            hidden_th: Hidden states of the tokens, text by text; behind them there may be rows
                without a meaning.
            texts: Places of the tokens of each text, and its keys and values of the layer.
            rows: Number of rows of every product, see `Matrix`.
        """
        qkv = self.qkv(self.first_norm(hidden_th), rows)
        attended, first = [], 0
        for places, cache in texts:
            last = first + places.num_tokens if len(texts) > 1 or rows else qkv.size(0)
            attended.append(self._attend(qkv[first:last], places, cache))
            first = last
        if first < qkv.size(0):
            attended.append(qkv.new_zeros(qkv.size(0) - first, attended[0].size(1)))
        attended_tn = attended[0] if len(attended) == 1 else torch.cat(attended)
        hidden_th = self.out.added(attended_tn, hidden_th, rows)
        gate_up = self.gate_up(self.second_norm(hidden_th), rows)
        if self.swiglu is not None:
            return self.down.added(self.swiglu(gate_up), hidden_th, rows)
        gate, up = gate_up.chunk(2, -1)
        return self.down.added(self.activation(gate).mul_(up), hidden_th, rows)

    def _attend(self, qkv: Tensor, places: Places, cache: KVCache) -> Tensor:
        """Return the attention of the tokens of a cache, whose keys and values it writes."""
        n, heads, groups, size = places.num_tokens, self.num_heads, self.num_groups, self.head_size
        qkv = qkv.view(-1, n, heads + 2 * groups, 2, size // 2)
        self._rotate(qkv.narrow(2, 0, heads + groups), places)
        queries, new = qkv.view(-1, n, heads + 2 * groups, size).split((heads, 2 * groups), 2)
        cache.write(places, new.view(-1, n, 2, groups, size))
        return places.attend(queries, cache.both, self.window)

    def _rotate(self, qk_bnm2f: Tensor, places: Places) -> None:
        """Norm queries and keys, if the model does, and rotate their two halves in place."""
        if self.qk_norm is not None:
            qk_bnm2f.copy_(self.qk_norm(qk_bnm2f.flatten(3)).view_as(qk_bnm2f))
        # rotate_half(x) is x with its halves exchanged and the new first one negated; the sign is
        # in the table
        exchanged = qk_bnm2f.flip(3)
        qk_bnm2f.mul_(places.cos_bn12f).addcmul_(exchanged, places.sin_bn12f)
