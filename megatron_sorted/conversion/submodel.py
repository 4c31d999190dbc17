"""A sub-model cut out of a nested model: an ordinary model of fewer layers, with the norm and head of its exit in the last place."""

import dataclasses

from megatron_sorted.conversion.open_model import OpenModel
from megatron_sorted.errors import SettingsError
from megatron_sorted.settings.derived import exit_depths
from megatron_sorted.settings.run import Settings


def check_depth(model: OpenModel, depth: int) -> None:
    """Returns nothing if the first ``depth`` layers are a model by themselves: one of its exits, or any layer of an ordinary model.

    Raises:
        SettingsError: They are not, naming the depths that are.
    """
    depths, layers = exit_depths(model.settings), model.settings.num_layers
    if not 1 <= depth <= layers:
        raise SettingsError(f"--depth: {depth} is not a layer of this model of {layers}. Use 1..{layers}.")
    if len(depths) > 1 and depth not in depths:
        raise SettingsError(f"--depth: {depth} is no exit of this model, so it was never trained to speak there. Its exits are "
                            f"{', '.join(map(str, depths))}.")


def submodel_settings(model: OpenModel, depth: int) -> Settings:
    """Returns the settings of the sub-model at ``depth``; shallower exits stay its exits.

    Raises:
        SettingsError: There is no such sub-model.
    """
    check_depth(model, depth)
    settings, own = model.settings, {pair.ours for pair in model.pairs}
    shallower = tuple(exit_depth for exit_depth in exit_depths(settings) if exit_depth < depth) if len(exit_depths(settings)) > 1 else ()
    has_own_head = f"exit_output_layers.{depth}.weight" in own
    return dataclasses.replace(
        settings, num_layers=depth, exit_layer_nums=(*shallower, depth),
        untie_embeddings_and_output_weights=settings.untie_embeddings_and_output_weights or has_own_head,
        use_exit_norm=settings.use_exit_norm and bool(shallower),
        untie_exit_output_weights=settings.untie_exit_output_weights and bool(shallower))
