"""Checkpoints as Megatron-LM's training saves them: through its own function where it is there.

The wheel of megatron-core holds ``megatron.training`` from 0.17 on. Under 0.16 the same calls of
``megatron.core`` are made here, with the arguments that ``megatron.training`` gives them.
"""

import argparse
import contextlib
import importlib.util
import queue
import sys
import types
import typing
from pathlib import Path
from unittest import mock

import torch

from megatron_sorted.settings.run import Settings
from tests.support.megatron_files import (
    PADDED,
    build_chunks,
    megatron_arguments,
    named_chunks,
    plain_name_of,
    sharded_chunks,
)


def has_training() -> bool:
    """Return whether the installed wheel holds Megatron-LM's training."""
    return importlib.util.find_spec("megatron.training") is not None


def _options(settings: Settings, save: str) -> list[str]:
    """Return the command line of Megatron-LM that trains the network of ``settings``."""
    flags = {
        "num-layers": settings.num_layers,
        "hidden-size": settings.hidden_size,
        "ffn-hidden-size": settings.ffn_hidden_size,
        "num-attention-heads": settings.num_attention_heads,
        "num-query-groups": settings.num_query_groups,
        "seq-length": settings.seq_length,
        "max-position-embeddings": settings.seq_length,
        "vocab-size": settings.vocab_size,
        "make-vocab-size-divisible-by": settings.make_vocab_size_divisible_by,
        "tensor-model-parallel-size": settings.tensor_model_parallel_size,
        "pipeline-model-parallel-size": settings.pipeline_model_parallel_size,
        "position-embedding-type": "rope",
        "normalization": "RMSNorm",
        "tokenizer-type": "NullTokenizer",
        "transformer-impl": "local",
        "micro-batch-size": 1,
        "global-batch-size": 4,
        "train-iters": 10,
        "lr": 0.0,
        "ckpt-format": "torch_dist",
        "save-interval": 1,
        "save": save,
    }
    switches = [
        "--group-query-attention",
        "--swiglu",
        "--disable-bias-linear",
        "--use-distributed-optimizer",
        "--no-gradient-accumulation-fusion",
        "--no-persist-layer-norm",
        "--no-masked-softmax-fusion",
        "--no-bias-swiglu-fusion",
    ]
    if settings.untie_embeddings_and_output_weights:
        switches.append("--untie-embeddings-and-output-weights")
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))] + switches


def _import_training() -> tuple:
    """Return the modules ``arguments``, ``checkpointing``, ``global_vars`` and ``training``."""
    # Two of its files decorate with what Python 3.12 brought; the decorator does nothing.
    if not hasattr(typing, "override"):
        typing.override = lambda function: function
    return tuple(
        importlib.import_module(f"megatron.training.{name}")
        for name in ("arguments", "checkpointing", "global_vars", "training")
    )


def _trained(chunks: list) -> tuple:
    """Return the chunks in Megatron's wrappers, their optimizer with a state, and its schedule.

    One step is made at a learning rate of 0, so the weights stay what they were.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    buffers = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True
    )
    wrapped = [
        DistributedDataParallel(chunk.config, buffers, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    config = OptimizerConfig(
        optimizer="adam",
        lr=0.0,
        min_lr=0.0,
        weight_decay=0.0,
        use_distributed_optimizer=True,
        params_dtype=torch.float32,
    )
    optimizer = get_megatron_optimizer(config, wrapped, use_gloo_process_groups=False)
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=0.0,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=10,
        lr_decay_style="linear",
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=10,
        wd_incr_style="constant",
    )
    generator = torch.Generator().manual_seed(1)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
        for parameter in chunk.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    optimizer.step()
    schedule.step(4)
    return wrapped, optimizer, schedule


def _save_with_core(settings: Settings, trained: tuple, directory: Path, step: int) -> None:
    """Call ``dist_checkpointing.save`` as Megatron-LM 0.16 does, with its arguments."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelSaveStrategyWrapper,
    )

    wrapped, optimizer, schedule = trained
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    content = {
        "distrib_optim_sharding_type": "dp_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    tensor = parallel_state.get_tensor_model_parallel_group()
    stages = parallel_state.get_pipeline_model_parallel_group()
    state = {
        "args": megatron_arguments(settings, use_distributed_optimizer=True),
        "checkpoint_version": 3.0,
        "iteration": step,
        **sharded_chunks([chunk.module for chunk in wrapped], {**content, "dp_cp_group": group}),
    }
    state["optimizer"] = optimizer.sharded_state_dict(
        state, metadata={**content, "dp_cp_group": group}
    )
    state["opt_param_scheduler"] = schedule.state_dict()
    state["rng_state"] = ShardedObject(
        "rng_state",
        [{"torch_rng_state": torch.get_rng_state()}],
        (stages.size(), tensor.size()),
        (stages.rank(), tensor.rank()),
        replica_id=group.rank(),
    )
    state["num_floating_point_operations_so_far"] = 0.0
    strategy = get_default_save_sharded_strategy("torch_dist")
    dist_checkpointing.save(
        state,
        str(directory),
        FullyParallelSaveStrategyWrapper(strategy, group, False),
        async_sharded_save=False,
        validate_access_integrity=True,
        preprocess_common_before_consistancy_check=lambda common: {
            **common,
            "args": vars(common["args"]),
        },
        content_metadata=content,
    )


def _save_with_training(settings: Settings, trained: tuple, root: str, step: int) -> None:
    """Call ``megatron.training.checkpointing.save_checkpoint`` with arguments that it parsed."""
    arguments, checkpointing, variables, training = _import_training()
    with mock.patch.object(sys, "argv", ["pretrain_gpt.py", *_options(settings, root)]):
        args = arguments.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # it prints all of its arguments
        # With tensor parallelism it asks which GPU there is.
        gpu = types.SimpleNamespace(major=10)
        with mock.patch.object(torch.cuda, "get_device_properties", lambda _device: gpu):
            arguments.validate_args(args)
        args.padded_vocab_size = PADDED  # by the tokenizer, later in Megatron-LM's start
        variables.set_args(args)
        checkpointing.save_checkpoint(
            step,
            *trained,
            num_floating_point_operations_so_far=0.0,
            checkpointing_context={},
            preprocess_common_state_dict_fn=training.preprocess_common_state_dict,
        )


def train_and_save(settings: Settings, seed_directory: str, root: str, step: int) -> list[str]:
    """Save a model of known weights and the state of its distributed optimizer, with a tracker.

    Returns:
        The names of what was saved beside tensors, by the loader of the installed Megatron.
    """
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()  # the writer is in this process
    chunks = build_chunks(settings)
    loaded = dist_checkpointing.load(sharded_chunks(chunks), seed_directory)
    for name, chunk in named_chunks(chunks, lambda chunk: chunk).items():
        chunk.load_state_dict(loaded[name])
    trained = _trained(chunks)
    directory = Path(root) / f"iter_{step:07d}"
    if has_training():
        _save_with_training(settings, trained, root, step)
    else:
        if dist.get_rank() == 0:
            directory.mkdir(parents=True)
            (directory.parent / "latest_checkpointed_iteration.txt").write_text(str(step))
        dist.barrier()
        _save_with_core(settings, trained, directory, step)
    common = dist_checkpointing.load_common_state_dict(str(directory))
    assert isinstance(common["args"], argparse.Namespace)
    return sorted(common)


def load_with_core(settings: Settings, directory: str) -> tuple[dict, list[str], list[str]]:
    """Load a checkpoint into GPTModel with ``dist_checkpointing.load`` on one process.

    Returns:
        The model's weights by the names of a sharded checkpoint, the names of the checkpoint that
        were not asked for, and those of weights that it does not hold.
    """
    from megatron.core import dist_checkpointing

    (model,) = build_chunks(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    loaded, missing, unexpected = dist_checkpointing.load(
        sharded_chunks([model]), directory, strict="return_all"
    )
    model.load_state_dict(loaded["model"])
    weights = {plain_name_of(name): value.detach() for name, value in model.named_parameters()}
    return weights, *(
        sorted(name for name in names if "_extra_state" not in name)
        for names in (missing, unexpected)
    )
