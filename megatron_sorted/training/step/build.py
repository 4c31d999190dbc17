"""Builds this rank's model chunks, optimizer and learning-rate schedule from the settings."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_attr_wrapped_model

from megatron_sorted.checkpoint.manifest import CONTENT
from megatron_sorted.checkpoint.sharding.optimizer_state import (
    count_padding_in_offsets,
    give_sgd_an_initial_state,
)
from megatron_sorted.loss.cross_entropy import VocabularyShard
from megatron_sorted.model.chunk import SortedChunk, freeze_others
from megatron_sorted.model.config import make_config, parameter_dtype, uses_transformer_engine
from megatron_sorted.model.spec import layer_spec
from megatron_sorted.parallel.copies import SharedCopies, connect_copies
from megatron_sorted.parallel.fsdp import FullyShardedChunk, connect_optimizer
from megatron_sorted.parallel.groups import Place, process_groups
from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.state import current_device, seed_everything
from megatron_sorted.settings.derived import global_batch_size, padded_vocab_size
from megatron_sorted.settings.layout import Layout, layout_of, vocabulary_rows
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step.muon import leave_lookups_and_outputs_to_adam, muon_options
from megatron_sorted.training.step.teacher import FrozenTeacher
from megatron_sorted.training.watch.timers import PhaseTimers


@dataclass
class Model:
    """This rank's model chunks, wrapped for training, and the objects that train them.

    Attributes:
        chunks: The model chunks of this rank, in the order in which a token passes them.
        config: Megatron's configuration, which all chunks share.
        groups: Megatron's process groups.
        layout: The layers, exits, norms and heads of every chunk of every stage.
        copies: The norms and output matrices of which other stages hold copies.
        shard: This rank's rows of the vocabulary.
        vocab_size: Number of real tokens, before padding.
        optimizer, schedule: Megatron's optimizer and learning-rate schedule; None until
            ``build_optimizer`` has run.
        timers: Timers of the phases of a step; disabled by default.
        num_tokens: Trained tokens of the last global batch, on the device; set only with
            per-token loss.
        teacher: The frozen model that exits learn from; None if they learn from the last exit.
    """

    chunks: list[DistributedDataParallel | FullyShardedChunk]
    config: TransformerConfig
    groups: ProcessGroupCollection
    layout: Layout
    copies: list[SharedCopies]
    shard: VocabularyShard
    vocab_size: int
    optimizer: MegatronOptimizer | None = None
    schedule: OptimizerParamScheduler | None = None
    timers: PhaseTimers = field(default_factory=lambda: PhaseTimers(False, lambda: None))
    num_tokens: torch.Tensor | None = None
    teacher: FrozenTeacher | None = None


def unwrap(chunk: torch.nn.Module) -> SortedChunk:
    """Return the model chunk inside Megatron's wrappers."""
    return get_attr_wrapped_model(chunk, "layout", return_model_obj=True)


def vocabulary_shard(
    settings: Settings, vocab_size: int, groups: ProcessGroupCollection
) -> VocabularyShard:
    """Return this rank's shard of a vocabulary of ``vocab_size`` real tokens."""
    rows = vocabulary_rows(settings, vocab_size, groups.tp.rank())
    return VocabularyShard(rows.start, len(rows), groups.tp, settings.sequence_parallel)


def build_model(settings: Settings, platform: Platform, place: Place, vocab_size: int) -> Model:
    """Build this rank's model with gradient buffers and equal shared copies.

    Collective: creates the groups of shared copies and broadcasts them (``connect_copies``).
    """
    groups = process_groups()
    seed_everything(settings.seed, groups)
    config = make_config(settings, platform)
    spec = layer_spec(settings, uses_transformer_engine(settings, platform))
    layout, rows = layout_of(settings), padded_vocab_size(vocab_size, settings)
    chunks: list[SortedChunk] = []
    for chunk_layout in layout.of_stage(place.stage):
        chunk = SortedChunk(settings, config, spec, rows, chunk_layout, groups, tuple(chunks))
        chunks.append(chunk.to(current_device()))
    for chunk in chunks:
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        freeze_others(chunk, settings)
    parameters = {
        kind: [p for chunk in chunks for p in chunk.heads.shared_parameters()[kind]]
        for kind in ("head", "norm")
    }
    copies = connect_copies(parameters, layout.copies)
    wrap = _shard_fully if settings.data_parallel == "fsdp" else _replicate
    wrapped = wrap(chunks, config, settings, platform)
    shard = vocabulary_shard(settings, vocab_size, groups)
    model = Model(wrapped, config, groups, layout, copies, shard, vocab_size)
    _connect_schedule(model, settings)
    if settings.exit_kd_teacher is not None and not settings.skip_train:
        model.teacher = FrozenTeacher(settings, platform, layout, place.stage, vocab_size)
    return model


def _replicate(
    chunks: list[SortedChunk], config: TransformerConfig, settings: Settings, _platform: Platform
) -> list:
    """Wrap the chunks with gradient buffers; every data parallel rank holds all weights."""
    half = parameter_dtype(settings) != torch.float32
    modules = [Float16Module(config, chunk) for chunk in chunks] if half else chunks
    buffers = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=settings.overlap_grad_reduce,
        overlap_param_gather=settings.overlap_param_gather,
        use_distributed_optimizer=settings.use_distributed_optimizer,
    )
    wrapped = [
        DistributedDataParallel(
            config, buffers, module, disable_bucketing=index > 0, pg_collection=chunk.groups
        )
        for index, (chunk, module) in enumerate(zip(chunks, modules, strict=True))
    ]
    count_padding_in_offsets(wrapped)
    return wrapped


def _shard_fully(
    chunks: list[SortedChunk], config: TransformerConfig, settings: Settings, platform: Platform
) -> list:
    """Wrap the only chunk of a network without pipeline stages.

    Every data parallel rank keeps some rows of each weight.
    """
    group = chunks[0].groups.dp_cp
    states = chunks[0].sharded_state_dict(metadata=dict(CONTENT))
    return [
        FullyShardedChunk(
            config, chunks[0], group, platform.device().type, parameter_dtype(settings), states
        )
    ]


def finalize_gradients(model: Model) -> Callable:
    """Return the function that Megatron's schedules call when all micro-batches are done.

    It runs Megatron's own reduction, then sums the gradients of shared copies. Both are linear, so
    the order does not change the sum; it matters to the distributed optimizer
    (``SharedCopies.sum_gradients``).

    Collective: the returned function communicates over data, tensor and pipeline groups.
    """

    def finalize(
        chunks: list,
        num_tokens: torch.Tensor | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **options,
    ) -> None:
        with model.timers("gradients"):
            finalize_model_grads(
                chunks, num_tokens, pg_collection=pg_collection or model.groups, **options
            )
            model.num_tokens = num_tokens  # summed over all ranks by now
            for copies in model.copies:
                copies.sum_gradients()

    return finalize


def _connect_schedule(model: Model, settings: Settings) -> None:
    """Connect gradient reduction to Megatron's schedules."""
    config, chunks = model.config, model.chunks
    config.finalize_model_grads_func = finalize_gradients(model)
    if settings.overlap_grad_reduce:
        several = len(chunks) > 1
        config.no_sync_func = [chunk.no_sync for chunk in chunks] if several else chunks[0].no_sync
        if several:
            config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]


def build_optimizer(model: Model, settings: Settings, world_size: int) -> None:
    """Build Megatron's optimizer and learning-rate schedule, and attach both to ``model``.

    Collective: creates groups for gradient statistics when Megatron does.
    """
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
        params_dtype=parameter_dtype(settings),
        loss_scale=settings.loss_scale,
        initial_loss_scale=settings.initial_loss_scale,
        min_loss_scale=settings.min_loss_scale,
        loss_scale_window=settings.loss_scale_window,
        hysteresis=settings.hysteresis,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        overlap_param_gather=settings.overlap_param_gather,
        **muon_options(settings),
    )
    if settings.optimizer == "muon":
        leave_lookups_and_outputs_to_adam(unwrap(chunk) for chunk in model.chunks)
    model.optimizer = get_megatron_optimizer(
        optimizer_config, model.chunks, use_gloo_process_groups=False, pg_collection=model.groups
    )
    give_sgd_an_initial_state(model.optimizer)
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
