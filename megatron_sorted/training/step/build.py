"""Settings -> model chunks, optimizer and learning-rate schedule of this rank."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_attr_wrapped_model

from megatron_sorted.checkpoint.manifest import CONTENT
from megatron_sorted.checkpoint.sharding.optimizer_state import (
    count_padding_in_offsets,
    give_sgd_a_first_state,
)
from megatron_sorted.loss.cross_entropy import VocabularyShard
from megatron_sorted.model.config import make_config, parameter_dtype, uses_transformer_engine
from megatron_sorted.model.spec import layer_spec
from megatron_sorted.model.stage import SortedStage, freeze_others
from megatron_sorted.parallel.copies import SharedCopies, connect_copies
from megatron_sorted.parallel.fsdp import FullyShardedStage, connect_optimizer
from megatron_sorted.parallel.groups import Place
from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.state import current_device, seed_everything
from megatron_sorted.platform.versions import known_arguments
from megatron_sorted.settings.derived import global_batch_size, padded_vocab_size
from megatron_sorted.settings.layout import Layout, layout_of
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.timers import PhaseTimers
from megatron_sorted.training.step.teacher import FrozenTeacher


@dataclass
class Model:
    """The chunks of this rank, wrapped for training, and what belongs to them.

    Attributes:
        layout: What every chunk of every stage holds.
        teacher: What every exit learns from, if not from the last one.
        num_tokens: Trained tokens of the global batch just passed, on the device; set with per-token loss only.
    """

    chunks: list[DistributedDataParallel | FullyShardedStage]
    config: TransformerConfig
    layout: Layout
    copies: list[SharedCopies]
    shard: VocabularyShard
    vocab_size: int
    optimizer: MegatronOptimizer | None = field(default=None)
    schedule: OptimizerParamScheduler | None = field(default=None)
    timers: PhaseTimers = field(default_factory=lambda: PhaseTimers(False, lambda: None))
    num_tokens: torch.Tensor | None = None
    teacher: FrozenTeacher | None = None


def unwrap(chunk: torch.nn.Module) -> SortedStage:
    """Return the stage inside Megatron's wrappers."""
    return get_attr_wrapped_model(chunk, "plan", return_model_obj=True)


def vocabulary_shard(settings: Settings, vocab_size: int) -> VocabularyShard:
    """Return this rank's part of a vocabulary of ``vocab_size`` real tokens."""
    group = parallel_state.get_tensor_model_parallel_group()
    rows = padded_vocab_size(vocab_size, settings) // group.size()
    first = rows * group.rank()
    return VocabularyShard(
        first, max(0, min(rows, vocab_size - first)), group, settings.sequence_parallel
    )


def build_model(settings: Settings, platform: Platform, place: Place, vocab_size: int) -> Model:
    """Return this rank's model with gradient buffers, all shared copies equal.

    Collective: creates the groups of shared copies and broadcasts them (``connect_copies``).
    """
    seed_everything(settings.seed)
    config = make_config(settings, platform)
    spec = layer_spec(settings, uses_transformer_engine(settings, platform))
    stages: list[SortedStage] = []
    layout = layout_of(settings)
    for plan in layout.of_stage(place.stage):
        stage = SortedStage(
            settings, config, spec, padded_vocab_size(vocab_size, settings), plan, tuple(stages)
        )
        stages.append(stage.to(current_device()))
    for stage in stages:
        for parameter in stage.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        freeze_others(stage, settings)
    parameters = {
        kind: [p for stage in stages for p in stage.heads.shared_parameters()[kind]]
        for kind in ("head", "norm")
    }
    copies = connect_copies(parameters, layout.copies)
    wrap = _shard_fully if settings.data_parallel == "fsdp" else _replicate
    model = Model(
        wrap(stages, config, settings, platform),
        config,
        layout,
        copies,
        vocabulary_shard(settings, vocab_size),
        vocab_size,
    )
    _connect_schedule(model, settings)
    if settings.exit_kd_teacher is not None and not settings.skip_train:
        model.teacher = FrozenTeacher(settings, platform, layout, place.stage, vocab_size)
    return model


def _replicate(
    stages: list[SortedStage], config: TransformerConfig, settings: Settings, _platform: Platform
) -> list:
    """Return the chunks with Megatron's gradient buffers, every data parallel rank holding all weights."""
    half = parameter_dtype(settings) != torch.float32
    wrapped = [Float16Module(config, stage) for stage in stages] if half else list(stages)
    buffers = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=settings.overlap_grad_reduce,
        overlap_param_gather=settings.overlap_param_gather,
        use_distributed_optimizer=settings.use_distributed_optimizer,
    )
    chunks = [
        DistributedDataParallel(config, buffers, module, disable_bucketing=index > 0)
        for index, module in enumerate(wrapped)
    ]
    count_padding_in_offsets(chunks)
    return chunks


def _shard_fully(
    stages: list[SortedStage], config: TransformerConfig, settings: Settings, platform: Platform
) -> list:
    """Return the only chunk of a network without stages, every data parallel rank keeping some rows of its weights."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    states = stages[0].sharded_state_dict(metadata=dict(CONTENT))
    return [
        FullyShardedStage(
            config, stages[0], group, platform.device().type, parameter_dtype(settings), states
        )
    ]


def finalize_gradients(model: Model) -> Callable:
    """Return the function that Megatron's schedules call when all micro-batches are done.

    Megatron's own reduction first; then gradients of shared copies are added up. Both are linear, so
    the order does not matter for the sum; it matters for the distributed optimizer
    (``SharedCopies.sum_gradients``).

    Collective: the returned function communicates over data, tensor and pipeline groups.
    """

    def finalize(chunks: list, num_tokens: torch.Tensor | None = None, **options) -> None:
        with model.timers("gradients"):
            finalize_model_grads(chunks, num_tokens, **options)
            model.num_tokens = num_tokens  # by now summed over all ranks
            for copies in model.copies:
                copies.sum_gradients()

    return finalize


def _connect_schedule(model: Model, settings: Settings) -> None:
    """Tell Megatron's schedules how gradients are reduced."""
    config, chunks = model.config, model.chunks
    config.finalize_model_grads_func = finalize_gradients(model)
    if settings.overlap_grad_reduce:
        several = len(chunks) > 1
        config.no_sync_func = [chunk.no_sync for chunk in chunks] if several else chunks[0].no_sync
        if several:
            config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]


def build_optimizer(model: Model, settings: Settings, world_size: int) -> None:
    """Give ``model`` Megatron's optimizer and learning-rate schedule.

    Collective: creates groups for gradient statistics when Megatron does.
    """
    dtype = parameter_dtype(settings)
    optimizer_config = OptimizerConfig(
        optimizer=settings.optimizer,
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        sgd_momentum=settings.sgd_momentum,
        clip_grad=settings.clip_grad,
        fp16=settings.fp16,
        bf16=settings.bf16,
        params_dtype=dtype,
        loss_scale=settings.loss_scale,
        initial_loss_scale=settings.initial_loss_scale,
        min_loss_scale=settings.min_loss_scale,
        loss_scale_window=settings.loss_scale_window,
        hysteresis=settings.hysteresis,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        **known_arguments(OptimizerConfig, overlap_param_gather=settings.overlap_param_gather),
    )
    model.optimizer = get_megatron_optimizer(
        optimizer_config, model.chunks, use_gloo_process_groups=False
    )
    give_sgd_a_first_state(model.optimizer)
    if settings.data_parallel == "fsdp":
        connect_optimizer(model.optimizer)
    model.config.grad_scale_func = model.optimizer.scale_loss
    samples = global_batch_size(settings, world_size)  # Megatron's schedule counts samples
    decay = settings.lr_decay_iters or max(settings.train_iters, 1)
    model.schedule = OptimizerParamScheduler(
        model.optimizer,
        init_lr=settings.lr_warmup_init,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters * samples,
        lr_decay_style=settings.lr_decay_style,
        lr_decay_steps=max(decay, settings.lr_warmup_iters + 1) * samples,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=decay * samples,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
