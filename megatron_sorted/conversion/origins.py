"""The tensor of a model from which each tensor of a new network is taken.

The new network is the same, has other exits, or is cut at an exit.
"""

import dataclasses
from collections.abc import Mapping

import torch

from megatron_sorted.conversion.open_model import OpenModel
from megatron_sorted.conversion.tensors.table import TensorPair, tensor_table
from megatron_sorted.settings.exit_parts import check_exit_parts
from megatron_sorted.settings.run import Settings


@dataclasses.dataclass(frozen=True)
class RequestedExits:
    """The exits that an imported model is to have; None keeps those of the model.

    ``origin_of`` defines the initial values of new norms, heads, blocks and MLPs.
    """

    depths: tuple[int, ...] | None = None
    own_norms: bool | None = None
    own_heads: bool | None = None
    own_blocks: bool | None = None
    own_mlps: bool | None = None

    def applied_to(self, settings: Settings) -> Settings:
        """Return the settings of the model with these exits.

        Raises:
            SettingsError: A depth is not a layer of the model, or exits cannot have these parts.
        """
        changes = {
            "exit_layer_nums": self.depths,
            "use_exit_norm": self.own_norms,
            "untie_exit_output_weights": self.own_heads,
            "use_exit_block": self.own_blocks,
            "use_exit_mlp": self.own_mlps,
        }
        changed = dataclasses.replace(
            settings, **{name: value for name, value in changes.items() if value is not None}
        )
        check_exit_parts(dataclasses.replace(changed, tune_exit=False))
        return changed


@dataclasses.dataclass(frozen=True)
class NetworkOrigin:
    """A network, whole or a sub-model cut out, and the model that its tensors come from.

    Attributes:
        model: The model that holds the tensors.
        settings: The settings of the network.
        origins: {our name of a tensor of the network: the model's tensor it is taken from}.
        exits: {depth in the network: depth of the model's exit there}, where the two differ.
        cast: The data type in which tensors are written; None leaves them as stored.
    """

    model: OpenModel
    settings: Settings
    origins: Mapping[str, TensorPair]
    exits: Mapping[int, int] = dataclasses.field(default_factory=dict)
    cast: torch.dtype | None = None


def whole_network(model: OpenModel, settings: Settings | None = None) -> NetworkOrigin:
    """Return the network of ``settings``, by default the model's own, with its origins."""
    settings = settings or model.settings
    return NetworkOrigin(model, settings, origins_of(model, settings))


def origins_of(model: OpenModel, settings: Settings) -> dict[str, TensorPair]:
    """Return the origin of every tensor of a network of ``settings``, by our name.

    The network may have exits with parts that the model lacks (``origin_of``). It may end at an
    exit of the model, whose norm and head are then the network's last. Adapters that the model
    lacks have no origin and are left out.
    """
    pairs = {pair.ours: origin_of(pair.ours, model, settings) for pair in tensor_table(settings)}
    return {name: pair for name, pair in pairs.items() if pair is not None}


def origin_of(name: str, model: OpenModel, settings: Settings) -> TensorPair | None:
    """Return the model's tensor that initializes a tensor of a network of ``settings``.

    Parts of exits that the model lacks start as copies: norm and head of those of the last exit, a
    block of the model's last layer (Balcony), an MLP with its norm of that layer's (EE-Tuning).
    None stands for a new adapter, which starts by adding nothing.

    Args:
        name: Our name of the tensor.
        model: The model that the network starts from.
        settings: The settings of the network.
    """
    own, depth = model.pair_of, settings.num_layers
    kind = name.split(".", 1)[0]
    if name == "decoder.final_layernorm.weight" or (kind == "exit_norms" and name not in own):
        return own.get(f"exit_norms.{depth}.weight", own["decoder.final_layernorm.weight"])
    if name == "output_layer.weight" or (kind == "exit_output_layers" and name not in own):
        last = own.get("output_layer.weight", own["embedding.word_embeddings.weight"])
        return own.get(f"exit_output_layers.{depth}.weight", last)
    if name not in own and kind == "exit_adapters":
        return None
    layer = f"decoder.layers.{model.settings.num_layers - 1}."
    if name not in own and kind == "exit_blocks":
        name = layer + name.split(".", 2)[2]
    elif name not in own and kind == "exit_mlps":
        name = f"{layer}mlp.{name.split('.', 2)[2]}"
    return own[name]
