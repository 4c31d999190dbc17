"""The modules that make up a transformer layer."""

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_sorted.model.attention import SdpaAttention
from megatron_sorted.model.norm import Norm
from megatron_sorted.model.sandwich import with_sandwich_norm
from megatron_sorted.platform.kernels import fused_kernels
from megatron_sorted.platform.versions import mlp_parts
from megatron_sorted.settings.run import Settings


class FusedSwiglu(MegatronModule):
    """The SwiGLU activation in one operation of the device.

    Its input holds the gate and the other half of the MLP's first product side by side [..., 2f].
    """

    def forward(self, both: torch.Tensor) -> torch.Tensor:
        """Return the activation [..., f]."""
        return fused_kernels().swiglu(both)


def layer_spec(settings: Settings, transformer_engine: bool) -> ModuleSpec:
    """Return Megatron's layer specification: Transformer Engine's, or the local one.

    The local one uses torch's attention and norm kernels. Attention is torch's in both, because it
    takes the mask that separates packed documents; Transformer Engine's causal attention ignores a
    mask silently. Only context parallelism needs Transformer Engine's own attention.
    """
    if transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=settings.num_experts, qk_layernorm=settings.qk_layernorm
        )
        if settings.context_parallel_size == 1:
            spec.submodules.self_attention.submodules.core_attention = SdpaAttention
        return with_sandwich_norm(spec, settings)
    spec = get_gpt_layer_local_spec(
        num_experts=settings.num_experts,
        qk_layernorm=settings.qk_layernorm,
        normalization=settings.normalization,
    )
    spec.submodules.input_layernorm = Norm
    spec.submodules.pre_mlp_layernorm = Norm
    if settings.num_experts is not None:
        # Transformer Engine's layers fuse this norm into a dense MLP alone; a checkpoint has the
        # same names for both kinds of layers
        spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = SdpaAttention
    if settings.swiglu and fused_kernels().swiglu is not None:
        mlp_parts(spec).activation_func = FusedSwiglu
    if settings.qk_layernorm:
        attention.q_layernorm = Norm
        attention.k_layernorm = Norm
    return with_sandwich_norm(spec, settings)
