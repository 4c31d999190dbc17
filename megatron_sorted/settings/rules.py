"""All rules between settings, checked before any process group starts."""

from megatron_sorted.settings.averaging import check_averaging
from megatron_sorted.settings.exit_distillation import check_exit_distillation
from megatron_sorted.settings.exit_parts import check_exit_parts
from megatron_sorted.settings.exit_weighting import check_exit_weighting
from megatron_sorted.settings.exits import check_exits
from megatron_sorted.settings.field import flag_of
from megatron_sorted.settings.files import check_files
from megatron_sorted.settings.layout_rules import (
    check_batch,
    check_interleaving,
    check_layout,
    check_recompute,
)
from megatron_sorted.settings.lora import check_adapters
from megatron_sorted.settings.model import check_experts, check_model
from megatron_sorted.settings.monitoring import check_monitoring, check_profile
from megatron_sorted.settings.muon import check_muon
from megatron_sorted.settings.parallel import check_data_parallel, check_device
from megatron_sorted.settings.require import require
from megatron_sorted.settings.rope import check_rope
from megatron_sorted.settings.run import Settings
from megatron_sorted.settings.training import check_training


def check_settings(settings: Settings, world_size: int) -> None:
    """Check that ``world_size`` processes can run these settings.

    Many rules are those of Megatron-LM's argument check, which the megatron-core package does not
    contain although its schedules and optimizers rely on them.

    Raises:
        SettingsError: A rule is broken; the message names the first one.
    """
    check_numbers(settings)
    check_model(settings)
    check_rope(settings)
    check_exit_weighting(settings)
    check_exit_parts(settings)
    check_exits(settings)
    check_exit_distillation(settings)
    check_adapters(settings)
    check_device(settings)
    check_layout(settings, world_size)
    check_experts(settings, world_size)
    check_batch(settings, world_size)
    check_interleaving(settings, world_size)
    check_recompute(settings)
    check_training(settings)
    check_muon(settings)
    check_averaging(settings)
    check_data_parallel(settings)
    check_files(settings)
    check_monitoring(settings)
    check_profile(settings, world_size)


POSITIVE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
    "num_query_groups", "seq_length", "max_position_embeddings", "rotary_base", "rotary_percent",
    "rotary_seq_len_interpolation_factor", "rope_scaling_factor", "rope_scaling_low_freq_factor",
    "rope_scaling_high_freq_factor", "rope_scaling_original_max_position_embeddings",
    "rope_scaling_beta_fast", "rope_scaling_beta_slow", "rope_scaling_mscale",
    "rope_scaling_attention_factor", "sliding_window", "norm_epsilon", "attn_post_norm_scale",
    "ffn_post_norm_scale",
    "make_vocab_size_divisible_by", "vocab_size", "init_method_std", "num_experts",
    "moe_router_topk", "moe_ffn_hidden_size", "num_sampled_exits", "exit_loss_chunk_tokens",
    "lora_alpha", "exit_gradient_balance", "exit_kd_temperature", "exit_kd_top_k", "world_size",
    "distributed_timeout_minutes", "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage", "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers", "context_parallel_size", "expert_model_parallel_size",
    "recompute_num_layers", "micro_batch_size", "global_batch_size", "lr", "lr_decay_iters",
    "adam_eps", "loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window",
    "hysteresis", "save_interval", "log_interval", "eval_interval", "eval_iters", "save_retain",
    "save_retain_interval", "exit_interval", "exit_duration_in_mins", "hang_timeout_minutes",
    "num_draft_tokens", "device_peak_tflops", "profile_step_end", "exit_layer_weight_scale",
    "exit_uncertainty_rate", "exit_uncertainty_variance", "exit_dwa_window", "exit_dwa_temperature",
    "exit_gradnorm_rate", "exit_simulated_thresholds", "exit_excess_rate", "exit_guard_rate",
    "exit_guard_largest", "exit_guard_loss", "exit_curriculum_interval", "exit_curriculum_fraction",
    "muon_extra_scale_factor", "muon_num_ns_steps", "average_every", "average_weights_decay",
)  # fmt: skip
NOT_NEGATIVE = (
    "moe_aux_loss_coeff", "exit_layer_weight_warmup_iters", "train_iters", "seed", "min_lr",
    "lr_warmup_iters", "lr_warmup_init", "weight_decay", "clip_grad", "nonfinite_steps_allowed",
    "profile_step_start", "ckpt_step", "exit_adapter_rank", "exit_gradnorm_alpha",
    "exit_simulated_sharpness", "exit_guard_margin", "exit_kd_weight", "lora_rank",
    "rope_scaling_mscale_all_dim",
    "average_weights_from",
)  # fmt: skip
BELOW_ONE = (
    "hidden_dropout",
    "attention_dropout",
    "adam_beta1",
    "adam_beta2",
    "sgd_momentum",
    "muon_momentum",
    "exit_inverse_loss_decay",
    "exit_guard_decay",
    "exit_excess_smoothing",
    "layer_dropout",
    "lora_dropout",
)


def check_numbers(settings: Settings) -> None:
    """Check that every number that is given lies in its range.

    Raises:
        SettingsError: One does not.
    """
    for name in POSITIVE:
        value = getattr(settings, name)
        require(
            value is None or value > 0,
            f"{flag_of(name)}: {value} is not above 0. Give a positive number.",
        )
    for name in NOT_NEGATIVE:
        value = getattr(settings, name)
        require(
            value is None or value >= 0, f"{flag_of(name)}: {value} is negative. Give 0 or more."
        )
    for name in BELOW_ONE:
        value = getattr(settings, name)
        require(
            0 <= value < 1, f"{flag_of(name)}: {value} is not in [0, 1). Give 0 or more, below 1."
        )
    require(
        settings.rotary_percent <= 1,
        f"--rotary-percent: {settings.rotary_percent} is above 1. It is a fraction; give at most "
        "1.",
    )
