"""The weights of a model directory, loaded by name into this rank's chunks."""

from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.optimizer import MegatronOptimizer

from megatron_sorted.checkpoint.sharding.sharded import weights_in_place
from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.conversion.origins import origin_of
from megatron_sorted.settings.lora import is_adapter
from megatron_sorted.settings.run import Settings


def load_by_name(
    directory: Path,
    settings: Settings,
    chunks: list[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
) -> None:
    """Load the weights of a model directory into this rank's chunks.

    The directory is a Hugging Face directory, or a checkpoint whose exits lack parts of this run's.
    Parts of exits that it lacks begin as ``conversion.origins.origin_of`` says. Every rank reads
    the tensors of its own layers, one at a time, and keeps its shard of each; no rank waits for
    another.

    Raises:
        CheckpointError: A tensor cannot be read.
    """
    model = open_model(directory)
    for chunk in chunks:
        state = weights_in_place(chunk)
        # gate and up of an MLP are one parameter and two shards, which become views of it
        apply_factories(state)
        shards: dict[str, list[ShardedTensor]] = {}
        for shard in nested_values(state):
            # adapters are new: they keep the values they were created with
            if isinstance(shard, ShardedTensor) and not is_adapter(shard.key):
                shards.setdefault(_full_name(shard), []).append(shard)
        with torch.no_grad():
            for name, shards_of_tensor in shards.items():
                origin = origin_of(name, model, settings)
                if origin is None:
                    continue
                whole = model.read_ours(origin)
                for shard in shards_of_tensor:
                    _copy_shard(whole, shard)
    if hasattr(optimizer, "reload_model_params"):
        optimizer.reload_model_params()


def _full_name(shard: ShardedTensor) -> str:
    """Return the name of a tensor with its layer's index, which Megatron keeps as an offset."""
    if shard.prepend_axis_num == 0:
        return shard.key
    return shard.key.replace("decoder.layers.", f"decoder.layers.{shard.global_offset[0]}.", 1)


def _copy_shard(whole: torch.Tensor, shard: ShardedTensor) -> None:
    """Copy a shard's part of the whole tensor into the parameter that the shard is a view of."""
    offsets = shard.global_offset[shard.prepend_axis_num :]
    bounds = zip(offsets, shard.local_shape, strict=True)
    source = whole[tuple(slice(begin, begin + size) for begin, size in bounds)]
    target = shard.data.view(shard.local_shape)
    # a rank may hold rows that pad the vocabulary: they keep their initial values
    target[tuple(slice(0, size) for size in source.shape)].copy_(source)
