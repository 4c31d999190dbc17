"""A sub-model cut out of a nested model: an ordinary model of fewer layers, with the norm and head of its exit in the last place.

An exit with a block of its own becomes a model of one layer more, the block. One with an MLP of its own becomes a model of one layer more
too: the base's next layer, whose MLP and norm before it are the exit's and whose attention adds nothing, because its output projection is
zero. (What comes before that projection is the base's own, which reads the same hidden state there, so it stays finite and can be trained
on.) An exit with an adapter is no ordinary model: no family adds a linear map of the hidden state that has not been normed.
"""

import dataclasses
from collections.abc import Mapping

import torch

from megatron_sorted.conversion.open_model import OpenModel
from megatron_sorted.conversion.origins import Part, origins_of, whole
from megatron_sorted.conversion.tensors.memory import new_tensor
from megatron_sorted.conversion.tensors.source import TensorInfo, TensorSource
from megatron_sorted.conversion.tensors.table import tensor_table
from megatron_sorted.errors import SettingsError
from megatron_sorted.settings.derived import exit_depths
from megatron_sorted.settings.run import Settings

ZERO = "zero"


def check_depth(model: OpenModel, depth: int) -> None:
    """Check that the first ``depth`` layers are a model by themselves: one of its exits, or any layer of an ordinary one.

    Raises:
        SettingsError: They are not, naming the depths that are.
    """
    depths, layers = exit_depths(model.settings), model.settings.num_layers
    if not 1 <= depth <= layers:
        raise SettingsError(
            f"--depth: {depth} is not a layer of this model of {layers}. Use 1..{layers}."
        )
    if len(depths) > 1 and depth not in depths:
        raise SettingsError(
            f"--depth: {depth} is no exit of this model, so it was never trained to speak there. Its exits are "
            f"{', '.join(map(str, depths))}."
        )
    if model.settings.exit_adapter_rank and depth < layers:
        raise SettingsError(
            f"--depth: exit {depth} reads the hidden state through an adapter of its own (exit_adapter_rank "
            f"{model.settings.exit_adapter_rank}), which no ordinary model has. Use --depth {layers}, the full model; "
            "nested_exits.py, beside the exported model, runs its exits."
        )


def has_layer_of_its_own(settings: Settings, depth: int) -> bool:
    """Return whether the sub-model of an exit has one layer more than the exit's depth: its block or MLP."""
    return depth in exit_depths(settings)[:-1] and (
        settings.use_exit_block or settings.use_exit_mlp
    )


def submodel_settings(model: OpenModel, depth: int) -> Settings:
    """Return the settings of the sub-model at ``depth``; shallower exits stay its exits.

    Raises:
        SettingsError: There is no such sub-model.
    """
    check_depth(model, depth)
    settings, own = model.settings, {pair.ours for pair in model.pairs}
    shallower = (
        tuple(exit_depth for exit_depth in exit_depths(settings) if exit_depth < depth)
        if len(exit_depths(settings)) > 1
        else ()
    )
    has_own_head = f"exit_output_layers.{depth}.weight" in own
    layers = depth + has_layer_of_its_own(settings, depth)
    return dataclasses.replace(
        settings,
        num_layers=layers,
        exit_layer_nums=(*shallower, layers),
        untie_embeddings_and_output_weights=settings.untie_embeddings_and_output_weights
        or has_own_head,
        use_exit_norm=settings.use_exit_norm and bool(shallower),
        untie_exit_output_weights=settings.untie_exit_output_weights and bool(shallower),
        use_exit_block=settings.use_exit_block and bool(shallower),
        use_exit_mlp=settings.use_exit_mlp and bool(shallower),
        exit_adapter_rank=settings.exit_adapter_rank if shallower else 0,
    )


def cut_submodel(model: OpenModel, depth: int) -> Part:
    """Return what an export needs to write the sub-model at ``depth``.

    Raises:
        SettingsError: There is no such sub-model.
    """
    settings = submodel_settings(model, depth)
    if settings.num_layers == depth:
        return whole(model, settings)
    # first as if the exit stood at the end of the base's own layers: its norm and head come in the last place
    own, table = model.pair_of, tensor_table(settings)
    origins = origins_of(
        model,
        dataclasses.replace(
            settings, num_layers=depth, exit_layer_nums=(*settings.exit_layer_nums[:-1], depth)
        ),
    )
    added = f"decoder.layers.{depth}."
    if model.settings.use_exit_block:
        origins |= {
            pair.ours: own[f"exit_blocks.{depth}.{pair.ours.removeprefix(added)}"]
            for pair in table
            if pair.ours.startswith(added)
        }
        return Part(model, settings, origins, {settings.num_layers: depth})
    mlp, zero = f"{added}mlp.", own[f"{added}self_attention.linear_proj.weight"]
    for pair in table:
        if pair.ours.startswith(mlp):
            origins[pair.ours] = own[f"exit_mlps.{depth}.{pair.ours.removeprefix(mlp)}"]
        elif pair.ours.startswith(added):
            origins[pair.ours] = own[pair.ours]
    names = (zero.ours,) if model.kind == "megatron" else zero.theirs
    origins[zero.ours] = dataclasses.replace(zero, ours=ZERO, theirs=(ZERO,))
    info = TensorInfo(zero.shape, model.source.tensors[names[0]].dtype)
    with_zero = dataclasses.replace(
        model, source=_WithZero(model.source, {**model.source.tensors, ZERO: info})
    )
    return Part(with_zero, settings, origins, {settings.num_layers: depth})


class _WithZero(TensorSource):
    """The tensors of a source and one of zeros."""

    def __init__(self, source: TensorSource, tensors: Mapping[str, TensorInfo]):
        self.source, self.tensors = source, tensors

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in memory of its own."""
        if name != ZERO:
            return self.source.read(name)
        return new_tensor(self.tensors[name].shape, self.tensors[name].dtype).zero_()
