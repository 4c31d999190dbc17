"""The three trainers of the benchmark of single steps.

They share configuration, layer specification, DDP, optimizer and schedule; only exits and loss
differ.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from lab.benchmarks.cases import Case
from lab.benchmarks.trainer import Trainer
from megatron_sorted.data.batches import Batch, make_train_batches
from megatron_sorted.model.chunk import SortedChunk
from megatron_sorted.model.config import make_config, uses_transformer_engine
from megatron_sorted.model.spec import layer_spec
from megatron_sorted.parallel.groups import process_groups, start_process_groups
from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.state import seed_everything
from megatron_sorted.platform.versions import known_arguments
from megatron_sorted.settings.coefficient_rule import coefficient_rule
from megatron_sorted.settings.derived import padded_vocab_size, trained_exits
from megatron_sorted.settings.layout import layout_of
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step.build import Model, build_optimizer, unwrap, vocabulary_shard
from megatron_sorted.training.step.train_step import run_schedule


@dataclass
class PlainForwardStep:
    """Forward-step function of megatron-core's GPTModel: its own loss, summed over the mask.

    Attributes:
        device: The device of the batches.
        coefficients: Unused, because there is one loss.
        num_micro_batches: A number that ``run_schedule`` sets.
    """

    device: torch.device
    coefficients: dict[int, float] = field(default_factory=dict)
    num_micro_batches: int = 1

    def __call__(self, batches: Iterator[Batch], chunk: torch.nn.Module):
        """Return the losses of all tokens and Megatron's loss function for them.

        Collective: none on one process.
        """
        batch = next(batches).to(self.device)
        losses_bs = chunk(batch.tokens_bs, batch.positions_bs, None, labels=batch.labels_bs)
        return losses_bs, lambda losses: (
            (losses * batch.loss_mask_bs).sum(),
            batch.loss_mask_bs.sum().int(),
            {},
        )


@dataclass
class EagerForwardStep:
    """Forward-step function that computes every exit's logits and loss in forward.

    Trainers with early exits commonly do this.

    Attributes:
        device: The device of the batches.
        output_layer: Megatron's output layer without a weight of its own.
        groups: Megatron's process groups.
        coefficients: {depth: coefficient} of the next step.
        num_micro_batches: A number that ``run_schedule`` sets.
    """

    device: torch.device
    output_layer: tensor_parallel.ColumnParallelLinear
    groups: ProcessGroupCollection
    coefficients: dict[int, float] = field(default_factory=dict)
    num_micro_batches: int = 1

    def __call__(self, batches: Iterator[Batch], chunk: torch.nn.Module):
        """Return the weighted losses of all tokens, summed over exits, and their loss function.

        Collective: none on one process.
        """
        stage, batch = unwrap(chunk), next(batches).to(self.device)
        labels_sb, losses = batch.labels_bs.t().contiguous(), []

        def at_exit(depth: int, hidden_sbh: torch.Tensor) -> torch.Tensor:
            head = stage.head(depth)
            logits_sbv, _ = self.output_layer(head.norm(hidden_sbh), weight=head.weight_ph)
            losses.append(
                self.coefficients[depth]
                * tensor_parallel.vocab_parallel_cross_entropy(
                    logits_sbv,
                    labels_sb,
                    **known_arguments(
                        tensor_parallel.vocab_parallel_cross_entropy, tp_group=self.groups.tp
                    ),
                )
            )
            return hidden_sbh

        chunk(
            batch.tokens_bs,
            batch.positions_bs,
            None,
            at_exit=at_exit,
            deepest=max(self.coefficients),
        )
        mask_sb = batch.loss_mask_bs.t()
        return torch.stack(losses).sum(0), lambda total: (
            (total * mask_sb).sum(),
            mask_sb.sum().int(),
            {},
        )


def _wrapped(module: torch.nn.Module, config, settings: Settings) -> Model:
    """Build a Model of one chunk like ``build_model``, with Megatron's own gradient reduction."""
    for parameter in module.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    groups = process_groups()
    chunk = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True),
        module,
        pg_collection=groups,
    )
    config.finalize_model_grads_func = finalize_model_grads
    return Model(
        [chunk],
        config,
        groups,
        layout_of(settings),
        [],
        vocabulary_shard(settings, settings.vocab_size, groups),
        settings.vocab_size,
    )


def _build_plain(settings: Settings, platform: Platform) -> tuple[Model, PlainForwardStep]:
    groups = process_groups()
    seed_everything(settings.seed, groups)
    config = make_config(settings, platform)
    module = GPTModel(
        config,
        layer_spec(settings, uses_transformer_engine(settings, platform)),
        padded_vocab_size(settings.vocab_size, settings),
        settings.seq_length,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_base=settings.rotary_base,
        pg_collection=groups,
    )
    return _wrapped(module.to(platform.device()), config, settings), PlainForwardStep(
        platform.device()
    )


def _build_eager(settings: Settings, platform: Platform) -> tuple[Model, EagerForwardStep]:
    groups = process_groups()
    seed_everything(settings.seed, groups)
    config = make_config(settings, platform)
    vocab_size = padded_vocab_size(settings.vocab_size, settings)
    spec = layer_spec(settings, uses_transformer_engine(settings, platform))
    (plan,) = layout_of(settings).chunks
    stage = SortedChunk(settings, config, spec, vocab_size, plan, groups).to(platform.device())
    output_layer = tensor_parallel.ColumnParallelLinear(
        settings.hidden_size,
        vocab_size,
        config=config,
        init_method=config.init_method,
        bias=False,
        skip_weight_param_allocation=True,
        tp_group=groups.tp,
    )
    forward_step = EagerForwardStep(platform.device(), output_layer, groups)
    return _wrapped(stage, config, settings), forward_step


def make_trainer(case: Case, settings: Settings, platform: Platform) -> Callable[[], None]:
    """Build a function that trains one step of the case.

    Collective: starts the process groups of this one process.
    """
    place = start_process_groups(settings, platform)
    if case.kind == "ours":
        return Trainer(settings, platform, place)
    model, forward_step = (_build_plain if case.kind == "plain" else _build_eager)(
        settings, platform
    )
    build_optimizer(model, settings, place.world_size)
    batches = make_train_batches(settings, None, 0, 1)
    forward_step.coefficients = trained_exits(settings, coefficient_rule(settings), 0)

    def their_step() -> None:
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
        model.optimizer.zero_grad()
        run_schedule(model, settings, forward_step, [next(batches)], forward_only=False)
        model.optimizer.step()
        model.schedule.step(increment=settings.global_batch_size)

    return their_step
