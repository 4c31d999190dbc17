"""Sub-models cut out of a nested model: ordinary models that end with an exit's norm and head.

A block of the exit becomes one more layer. So does an MLP of the exit: the MLP and its norm replace
those of a copy of the base model's next layer, whose attention adds nothing because its output
projection is zero. (The weights before that projection are the base's own, which read the same
hidden state there, so they stay finite and can be trained on.) An exit with an adapter has no
ordinary counterpart: no family adds a linear map of the hidden state before a norm.
"""

import dataclasses

from megatron_sorted.conversion.open_model import OpenModel
from megatron_sorted.conversion.origins import NetworkOrigin, origins_of, whole_network
from megatron_sorted.conversion.tensors.memory import new_tensor
from megatron_sorted.conversion.tensors.source import Overlay, TensorInfo
from megatron_sorted.conversion.tensors.table import tensor_table
from megatron_sorted.errors import SettingsError
from megatron_sorted.settings.derived import exit_depths
from megatron_sorted.settings.run import Settings

ZERO = "zero"


def check_depth(model: OpenModel, depth: int) -> None:
    """Check that the first ``depth`` layers can be cut out as a model.

    A nested model can be cut at its exits, an ordinary one at any layer.

    Raises:
        SettingsError: They cannot. The message names the depths that can.
    """
    depths, layers = exit_depths(model.settings), model.settings.num_layers
    if not 1 <= depth <= layers:
        raise SettingsError(
            f"--depth: {depth} is not a layer of this model of {layers}. Use 1..{layers}."
        )
    if len(depths) > 1 and depth not in depths:
        raise SettingsError(
            f"--depth: {depth} is no exit of this model, so it was never trained to predict there. "
            f"Its exits are {', '.join(map(str, depths))}."
        )
    if model.settings.exit_adapter_rank and depth < layers:
        raise SettingsError(
            f"--depth: exit {depth} reads the hidden state through an adapter of its own "
            f"(exit_adapter_rank {model.settings.exit_adapter_rank}), which no ordinary model has. "
            f"Use --depth {layers}, the full model; nested_exits.py, beside the exported model, "
            "runs its exits."
        )


def has_layer_of_its_own(settings: Settings, depth: int) -> bool:
    """Return whether an exit's block or MLP makes its sub-model one layer deeper than the exit."""
    return depth in exit_depths(settings)[:-1] and (
        settings.use_exit_block or settings.use_exit_mlp
    )


def submodel_settings(model: OpenModel, depth: int) -> Settings:
    """Return the settings of the sub-model at ``depth``, which keeps the shallower exits.

    Raises:
        SettingsError: There is no such sub-model.
    """
    check_depth(model, depth)
    settings, model_pairs = model.settings, {pair.ours for pair in model.pairs}
    shallower = (
        tuple(exit_depth for exit_depth in exit_depths(settings) if exit_depth < depth)
        if len(exit_depths(settings)) > 1
        else ()
    )
    has_own_head = f"exit_output_layers.{depth}.weight" in model_pairs
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


def cut_submodel(model: OpenModel, depth: int) -> NetworkOrigin:
    """Return the sub-model at ``depth`` with the origins of its tensors, for an export.

    Raises:
        SettingsError: There is no such sub-model.
    """
    settings = submodel_settings(model, depth)
    if settings.num_layers == depth:
        return whole_network(model, settings)
    # For the origins of norm and head, treat the exit as the end of the base's own layers.
    model_pairs, table = model.pair_of, tensor_table(settings)
    origins = origins_of(
        model,
        dataclasses.replace(
            settings, num_layers=depth, exit_layer_nums=(*settings.exit_layer_nums[:-1], depth)
        ),
    )
    added = f"decoder.layers.{depth}."
    if model.settings.use_exit_block:
        origins |= {
            pair.ours: model_pairs[f"exit_blocks.{depth}.{pair.ours.removeprefix(added)}"]
            for pair in table
            if pair.ours.startswith(added)
        }
        return NetworkOrigin(model, settings, origins, {settings.num_layers: depth})
    mlp, zero = f"{added}mlp.", model_pairs[f"{added}self_attention.linear_proj.weight"]
    for pair in table:
        if pair.ours.startswith(mlp):
            origins[pair.ours] = model_pairs[f"exit_mlps.{depth}.{pair.ours.removeprefix(mlp)}"]
        elif pair.ours.startswith(added):
            origins[pair.ours] = model_pairs[pair.ours]
    origins[zero.ours] = dataclasses.replace(zero, ours=ZERO, theirs=(ZERO,))
    info = TensorInfo(zero.shape, model.dtype_of(zero))
    zeros = {ZERO: (info, lambda: new_tensor(info.shape, info.dtype).zero_())}
    with_zeros = dataclasses.replace(model, source=Overlay(model.source, zeros))
    return NetworkOrigin(with_zeros, settings, origins, {settings.num_layers: depth})
