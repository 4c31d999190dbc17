"""The only place that fills Megatron's TransformerConfig."""

import inspect

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter

from megatron_sorted.errors import PlatformError
from megatron_sorted.model.rotary import set_attention_factor
from megatron_sorted.parallel.fsdp import check_torch_can_shard
from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.kernels import fused_kernels
from megatron_sorted.platform.muon import check_muon_is_there
from megatron_sorted.platform.versions import megatron_version
from megatron_sorted.settings.derived import ffn_hidden_size, kv_channels
from megatron_sorted.settings.layout import layers_of_chunks, num_virtual_chunks
from megatron_sorted.settings.rope_scaling import rope_of
from megatron_sorted.settings.run import Settings


def parameter_dtype(settings: Settings) -> torch.dtype:
    """Return the dtype of parameters and activations."""
    if settings.bf16:
        return torch.bfloat16
    return torch.float16 if settings.fp16 else torch.float32


def uses_transformer_engine(settings: Settings, platform: Platform) -> bool:
    """Return whether layers are built from Transformer Engine."""
    if settings.transformer_impl == "auto":
        # adapters need Megatron's local layers
        return platform.has_transformer_engine() and not settings.lora_rank
    return settings.transformer_impl == "transformer_engine"


def check_platform(settings: Settings, platform: Platform) -> None:
    """Check that the platform supports the settings, before process groups start.

    Raises:
        PlatformError: The device, torch or Megatron lacks something that the settings need.
    """
    if settings.data_parallel == "fsdp":
        check_torch_can_shard()
    if settings.optimizer == "muon":
        check_muon_is_there()
    if settings.transformer_impl == "transformer_engine" and not platform.has_transformer_engine():
        raise PlatformError(
            "--transformer-impl transformer_engine: Transformer Engine is not installed or "
            f"cannot run on {platform.name}. "
            "Install it on a GPU host, or use --transformer-impl local."
        )
    if settings.bf16 and not platform.has_bf16():
        raise PlatformError(
            f"--bf16: the device ({platform.name}) does not support bf16. Use --fp16, which "
            "scales the loss, or leave both out."
        )
    if settings.context_parallel_size > 1 and not uses_transformer_engine(settings, platform):
        raise PlatformError(
            f"--context-parallel-size: {settings.context_parallel_size} needs Transformer Engine's "
            f"attention, which is not available on {platform.name}. "
            "Install Transformer Engine on GPU hosts, or use 1."
        )
    if settings.num_experts and not platform.has_transformer_engine():
        _check_router(settings, platform)
    backend = (
        platform.backend if settings.distributed_backend == "auto" else settings.distributed_backend
    )
    tp, ep = settings.tensor_model_parallel_size, settings.expert_model_parallel_size
    is_unequal = settings.moe_token_dispatcher_type == "alltoall" and tp > 1 and ep > 1
    if settings.num_experts and is_unequal and backend == "gloo":
        raise PlatformError(
            "--moe-token-dispatcher-type alltoall: with --tensor-model-parallel-size "
            f"{tp} and --expert-model-parallel-size {ep} ranks gather unequal numbers of tokens, "
            "which gloo cannot do. Use allgather, or set one of the sizes to 1."
        )


def can_route_without_transformer_engine() -> bool:
    """Return whether the installed router of experts takes torch's matrix product.

    It does where Megatron looked for Transformer Engine's product and found none: the name is None
    then. megatron-core 0.16 leaves the name undefined and fails at the first token.
    """
    return getattr(moe_utils, "te_general_gemm", moe_utils) is None


def _check_router(settings: Settings, platform: Platform) -> None:
    """Check that experts can run on a device without Transformer Engine.

    Raises:
        PlatformError: The router needs Transformer Engine.
    """
    if can_route_without_transformer_engine():
        return
    reason = f"--num-experts: {settings.num_experts} needs Transformer Engine"
    if hasattr(moe_utils, "te_general_gemm"):
        raise PlatformError(
            f"{reason}: it is installed, so megatron-core's router calls it, but it cannot run on "
            f"{platform.name}. Uninstall it, use another device, or leave --num-experts out."
        )
    raise PlatformError(
        f"{reason}: the router of the installed megatron-core {megatron_version()} calls its "
        "matrix product without checking that it is there, and it is not available on "
        f"{platform.name}. "
        "Install megatron-core 0.17 or later (on Python 3.12 or later), whose router does without, "
        "or Transformer Engine on a GPU host; or leave --num-experts out."
    )


def uses_fused_swiglu(settings: Settings, platform: Platform) -> bool:
    """Return whether the layers' SwiGLU is one operation of the device."""
    return (
        settings.swiglu
        and fused_kernels().swiglu is not None
        and not uses_transformer_engine(settings, platform)
    )


def _layout(settings: Settings) -> list[list[str]] | None:
    """Return the layers of every chunk in Megatron's notation; None if Megatron divides them."""
    if settings.pipeline_model_parallel_layout is None:
        return None
    chunks = [["decoder"] * layers for layers in layers_of_chunks(settings)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def _balance_loss_factor(settings: Settings) -> int:
    """Return what the balance loss of experts must be multiplied by, to weigh as it should.

    Up to megatron-core 0.18 its gradient is multiplied by a rank's own number of tokens and then
    divided by that of all ranks that share a sequence, so with per-token loss it weighs less the
    more ranks share one. From 0.19 on the router multiplies by their number too.
    """
    if not settings.calculate_per_token_loss:
        return 1
    source = inspect.getsource(TopKRouter.attach_and_log_load_balancing_loss)
    if "tp_cp_group.size()" in source:
        return 1
    return settings.tensor_model_parallel_size * settings.context_parallel_size


def make_config(settings: Settings, platform: Platform) -> TransformerConfig:
    """Build Megatron's configuration of the run that ``settings`` describe."""
    dtype = parameter_dtype(settings)
    chunks = num_virtual_chunks(settings)
    interleaved = chunks > 1
    recompute = (
        {}
        if settings.recompute_granularity == "none"
        else {"recompute_granularity": settings.recompute_granularity}
    )
    if settings.recompute_granularity == "full":
        recompute |= {
            "recompute_method": settings.recompute_method,
            "recompute_num_layers": settings.recompute_num_layers,
        }
    if settings.recompute_granularity == "selective":
        recompute["recompute_modules"] = list(settings.recompute_modules)
    experts = {}
    if settings.num_experts is not None:
        experts = {
            "num_moe_experts": settings.num_experts,
            "moe_router_topk": settings.moe_router_topk,
            # a softmax over one chosen expert would be 1 whatever the router says
            "moe_router_pre_softmax": settings.moe_router_topk == 1,
            "moe_ffn_hidden_size": settings.moe_ffn_hidden_size or ffn_hidden_size(settings),
            "moe_aux_loss_coeff": settings.moe_aux_loss_coeff * _balance_loss_factor(settings),
            "moe_token_dispatcher_type": settings.moe_token_dispatcher_type,
        }
    config = TransformerConfig(
        # network
        num_layers=settings.num_layers,
        hidden_size=settings.hidden_size,
        ffn_hidden_size=ffn_hidden_size(settings),
        num_attention_heads=settings.num_attention_heads,
        num_query_groups=settings.num_query_groups if settings.group_query_attention else None,
        kv_channels=kv_channels(settings),
        normalization=settings.normalization,
        layernorm_epsilon=settings.norm_epsilon,
        gated_linear_unit=settings.swiglu,
        activation_func=torch.nn.functional.silu if settings.swiglu else torch.nn.functional.gelu,
        add_bias_linear=not settings.disable_bias_linear,
        add_qkv_bias=settings.add_qkv_bias,
        qk_layernorm=settings.qk_layernorm,
        init_method_std=settings.init_method_std,
        hidden_dropout=settings.hidden_dropout,
        attention_dropout=settings.attention_dropout,
        # precision
        fp16=settings.fp16,
        bf16=settings.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        attention_softmax_in_fp32=True,
        # layout
        tensor_model_parallel_size=settings.tensor_model_parallel_size,
        pipeline_model_parallel_size=settings.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if interleaved else None,
        num_layers_in_first_pipeline_stage=settings.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=settings.decoder_last_pipeline_num_layers,
        sequence_parallel=settings.sequence_parallel,
        context_parallel_size=settings.context_parallel_size,
        expert_model_parallel_size=settings.expert_model_parallel_size,
        overlap_p2p_comm=interleaved and settings.overlap_p2p_communication,
        batch_p2p_comm=not (interleaved and settings.overlap_p2p_communication),
        batch_p2p_sync=False,
        deallocate_pipeline_outputs=platform.can_deallocate_pipeline_outputs(),
        calculate_per_token_loss=settings.calculate_per_token_loss,
        # kernels that need Apex or Transformer Engine stay off unless their layers are used
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        # the device's fused operations take the place of Transformer Engine's (see layer_spec)
        apply_rope_fusion=settings.position_embedding_type == "rope"
        and fused_kernels().rotary is not None,
        pipeline_model_parallel_layout=_layout(settings),
        use_te_activation_func=uses_fused_swiglu(settings, platform),
        **recompute,
        **experts,
    )
    set_attention_factor(config, rope_of(settings))
    return config
