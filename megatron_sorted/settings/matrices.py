"""Shapes and parameters of a layer's matrices, whole or on one tensor parallel rank."""

from dataclasses import dataclass

from megatron_sorted.settings.derived import ffn_hidden_size, kv_channels, num_query_groups
from megatron_sorted.settings.field import AllSettings


@dataclass(frozen=True)
class LayerShapes:
    """Widths of a layer.

    Attributes:
        hidden: Width of the hidden state.
        head: Width of one attention head.
        norm: Number of parameters of one norm of the hidden state.
        query, key_value: Widths of all queries, and of all keys (or values).
        fc1, ffn: Widths of the output of the MLP's first product and of the input of its second.
    """

    hidden: int
    head: int
    norm: int
    query: int
    key_value: int
    fc1: int
    ffn: int

    @property
    def packed(self) -> int:
        """Return the width of queries, keys and values together."""
        return self.query + 2 * self.key_value

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return {name in Megatron's layers: (rows, columns)}."""
        return {
            "linear_qkv": (self.packed, self.hidden),
            "linear_proj": (self.hidden, self.query),
            "linear_fc1": (self.fc1, self.hidden),
            "linear_fc2": (self.hidden, self.ffn),
        }

    def products(self, with_attention: bool = True) -> int:
        """Return the number of weights in the matrices of the whole layer or of its MLP alone."""
        return self.hidden * (self.fc1 + self.ffn + with_attention * (self.packed + self.query))

    def parameters(self, settings: AllSettings, with_attention: bool = True) -> int:
        """Return all parameters of a layer, or of one without attention (an exit's MLP)."""
        biases, norms = (
            not settings.disable_bias_linear,
            (2 if settings.use_sandwich_norm else 1) * self.norm,
        )
        total = self.products(with_attention) + norms + (self.fc1 + self.hidden) * biases
        if with_attention:
            total += norms + self.packed * (biases or settings.add_qkv_bias) + self.hidden * biases
            total += self.head_norms(settings)
        return total

    def head_norms(self, settings: AllSettings) -> int:
        """Return the parameters of the norms of queries and keys."""
        return 2 * self.head * (self.norm // self.hidden) * settings.qk_layernorm


def layer_shapes(
    settings: AllSettings, tensor_size: int = 1, ffn: int | None = None
) -> LayerShapes:
    """Return the widths of a layer.

    Args:
        settings: The run.
        tensor_size: The number of tensor parallel ranks that share the layer.
        ffn: The width of the MLP, by default the settings'.
    """
    h, d = settings.hidden_size, kv_channels(settings)
    ffn = (ffn_hidden_size(settings) if ffn is None else ffn) // tensor_size
    return LayerShapes(
        hidden=h,
        head=d,
        norm=h if settings.normalization == "RMSNorm" else 2 * h,
        query=settings.num_attention_heads * d // tensor_size,
        key_value=num_query_groups(settings) * d // tensor_size,
        fc1=ffn * (2 if settings.swiglu else 1),
        ffn=ffn,
    )
