"""A decoder layer of the LLaMA family in few operations: joined matrices, KV cache in place."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_sorted.decoding.cache.matrix import Matrices
from megatron_sorted.decoding.cache.places import Places


@dataclass(frozen=True)
class KVCache:
    """The keys and values of one layer, in memory that stays where it is.

    Attributes:
        keys, values: Keys and values, [b, groups, capacity, d].
    """

    keys: Tensor
    values: Tensor

    def write(self, places: Places, keys_bngd: Tensor, values_bngd: Tensor) -> None:
        """Store the keys and values of the tokens at ``places``."""
        if places.first is not None:
            span = slice(places.first, places.first + keys_bngd.size(1))
            self.keys[:, :, span] = keys_bngd.transpose(1, 2)
            self.values[:, :, span] = values_bngd.transpose(1, 2)
        else:
            self.keys[places.rows_b1, :, places.slots_bn] = keys_bngd
            self.values[places.rows_b1, :, places.slots_bn] = values_bngd


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
        self.first_norm, self.second_norm = module.input_layernorm, module.post_attention_layernorm
        self.qkv = matrices.joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self.gate_up = matrices.joined([mlp.gate_proj, mlp.up_proj])
        self.out, self.down = matrices.of(attention.o_proj), matrices.of(mlp.down_proj)
        self.activation = mlp.act_fn
        self.qk_weight = None
        if hasattr(attention, "q_norm"):
            both = [
                attention.q_norm.weight.expand(self.num_heads, -1),
                attention.k_norm.weight.expand(self.num_groups, -1),
            ]
            self.qk_weight, self.qk_epsilon = torch.cat(both), attention.q_norm.variance_epsilon

    def __call__(self, hidden_bnh: Tensor, places: Places, cache: KVCache) -> Tensor:
        """Return the new tokens' hidden state after the layer, and write ``cache``."""
        b, n, _ = hidden_bnh.shape
        both, groups, size = self.num_heads + self.num_groups, self.num_groups, self.head_size
        qkv = self.qkv(norm(hidden_bnh, self.first_norm)).view(b, n, both + groups, size)
        qk = qkv[:, :, :both]
        if self.qk_weight is not None:
            qk = F.rms_norm(qk, (size,), None, self.qk_epsilon) * self.qk_weight
        # rotate_half(x) is x rolled by half with its first half negated; the sign is in the table
        qk = torch.addcmul(
            qk * places.cos_bnd[:, :, None], qk.roll(size // 2, dims=-1), places.sin_bnd[:, :, None]
        )
        cache.write(places, qk[:, :, self.num_heads :], qkv[:, :, both:])
        attended = places.attend(qk[:, :, : self.num_heads], cache.keys, cache.values, self.window)
        hidden_bnh = hidden_bnh + self.out(attended)
        gate, up = self.gate_up(norm(hidden_bnh, self.second_norm)).chunk(2, dim=-1)
        return hidden_bnh + self.down(self.activation(gate) * up)


def norm(hidden: Tensor, module: nn.Module) -> Tensor:
    """Apply the RMSNorm ``module`` of transformers in one operation."""
    return F.rms_norm(hidden, module.weight.shape, module.weight, module.variance_epsilon)
