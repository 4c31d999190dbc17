"""Sandwich norm: the outputs of attention and MLP are normed before they join the residual.

Source: CogView, arXiv 2105.13290, section 3.3.
"""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_sorted.model.norm import Norm
from megatron_sorted.settings.run import Settings

BiasDropoutAdd = Callable[
    [tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor
]


def _normed(
    add: Callable[[bool, bool], BiasDropoutAdd], norm: torch.nn.Module, training: bool, fused: bool
) -> BiasDropoutAdd:
    """Return Megatron's residual addition ``add(training, fused)`` with a norm before it.

    The addition receives the normed sum of output and bias instead of the two.
    """

    def add_normed(
        output: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        x, bias = output
        return add(training, fused)(
            (norm(x if bias is None else x + bias), None), residual, dropout
        )

    return add_normed


class SandwichLayer(TransformerLayer):
    """Megatron's layer with a norm after attention and one after the MLP.

    Each stands before the residual is added. Megatron's forward is unchanged: it calls
    ``self_attn_bda`` and ``mlp_bda`` to add an output to the residual, and those norm first. A
    layer without attention (an exit's MLP) has the second norm only.

    Args:
        attention_scale: Initial weight of the norm after attention.
        mlp_scale: Initial weight of the norm after the MLP.
        rest: Arguments of Megatron's layer.
    """

    def __init__(self, *rest, attention_scale: float, mlp_scale: float, **options):
        super().__init__(*rest, **options)
        if not isinstance(self.self_attention, IdentityOp):
            self.post_self_attn_layernorm = self._make_norm(attention_scale)
            self.self_attn_bda = partial(_normed, self.self_attn_bda, self.post_self_attn_layernorm)
        self.post_mlp_layernorm = self._make_norm(mlp_scale)
        self.mlp_bda = partial(_normed, self.mlp_bda, self.post_mlp_layernorm)

    def _make_norm(self, scale: float) -> torch.nn.Module:
        norm = Norm(self.config, self.config.hidden_size, self.config.layernorm_epsilon)
        torch.nn.init.constant_(norm.weight, scale)
        return norm


def with_sandwich_norm(spec: ModuleSpec, settings: Settings) -> ModuleSpec:
    """Return the specification of a layer, with sandwich norms where the settings request them."""
    if not settings.use_sandwich_norm:
        return spec
    scales = {
        "attention_scale": settings.attn_post_norm_scale,
        "mlp_scale": settings.ffn_post_norm_scale,
    }
    return ModuleSpec(
        module=SandwichLayer, submodules=spec.submodules, params={**spec.params, **scales}
    )
