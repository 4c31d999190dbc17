"""Which tensors of a model a new network is made of: the same network, with other exits, or cut at one."""

import dataclasses
from collections.abc import Mapping

import torch

from megatron_sorted.conversion.open_model import OpenModel
from megatron_sorted.conversion.tensors.table import TensorPair, tensor_table
from megatron_sorted.settings.exit_parts import check_exit_parts
from megatron_sorted.settings.run import Settings


@dataclasses.dataclass(frozen=True)
class Exits:
    """Exits to give a model that is imported; None keeps those it has.

    New parts of their own begin as ``origin_of`` says.
    """

    depths: tuple[int, ...] | None = None
    own_norms: bool | None = None
    own_heads: bool | None = None
    own_blocks: bool | None = None
    own_mlps: bool | None = None

    def on(self, settings: Settings) -> Settings:
        """Return the settings with these exits.

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
class Part:
    """A network and the model it is made of: all of it, or a sub-model cut out.

    Attributes:
        model: Where the tensors come from.
        settings: Of the network.
        origins: For every tensor of it, the model's own that it is made of, by our name.
        exits: {depth in the network: the model's exit that stands there}, where the two differ.
        cast: The kind of numbers in which tensors are written; None as they are stored.
    """

    model: OpenModel
    settings: Settings
    origins: Mapping[str, TensorPair]
    exits: Mapping[int, int] = dataclasses.field(default_factory=dict)
    cast: torch.dtype | None = None


def whole(model: OpenModel, settings: Settings | None = None) -> Part:
    """Return the network of ``settings``, by default the model's own, made of a model."""
    settings = settings or model.settings
    return Part(model, settings, origins_of(model, settings))


def origins_of(model: OpenModel, settings: Settings) -> dict[str, TensorPair]:
    """Return the origin of every tensor of a network of ``settings``, by our name.

    The network may have exits with parts that the model has not (``origin_of``). It may end at an
    exit of the model: what reads that exit then stands in the last place. An adapter that the
    model has not is made of nothing, and absent.
    """
    found = {pair.ours: origin_of(pair.ours, model, settings) for pair in tensor_table(settings)}
    return {name: pair for name, pair in found.items() if pair is not None}


def origin_of(name: str, model: OpenModel, settings: Settings) -> TensorPair | None:
    """Return the model's own tensor that a tensor of a network of ``settings`` is made of.

    None: it is made of nothing. Parts of exits that the model has not begin as copies: norm and
    head of the last exit's, a block of the model's last layer (Balcony), an MLP of that layer's
    with its norm (EE-Tuning). An adapter begins as it was made: it adds nothing.

    Args:
        name: Ours.
        model: Where the network begins.
        settings: Of the network.
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
