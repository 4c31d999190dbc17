"""A nested model prepared for decoding: its layers, and the readout of each exit."""

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_sorted.conversion.hugging_face.families import CONFIG_FILE, FAMILIES
from megatron_sorted.conversion.hugging_face.nested_exits import NestedExit
from megatron_sorted.decoding.cache.eager import EagerWeights
from megatron_sorted.decoding.cache.memory import BatchCache
from megatron_sorted.decoding.cache.passes import Passes
from megatron_sorted.decoding.cache.weights import Weights
from megatron_sorted.decoding.native.choice import native_kind, refuse_or_report
from megatron_sorted.decoding.native.compiler import NativeError
from megatron_sorted.decoding.native.network import NativeWeights
from megatron_sorted.errors import SettingsError
from megatron_sorted.exported.load import load_with_exits
from megatron_sorted.platform.graphs import graphs_of
from megatron_sorted.settings.rope_scaling import Rope


class Network:
    """The layers and exits of a transformers model, as they are decoded.

    Attributes:
        model: The model. If the compiled library runs the network, its matrices are freed and only
            its config and generation config are usable; see `whole_model`.
        depths: Depths of its exits, increasing; the last is the full model.
        weights: The weights.
        num_layers: Number of layers.
        graphs: Whether forward passes take the tokens' positions from the device, so that they can
            be recorded as graphs and replayed.
        make_recorder: Function that makes a recorder of graphs; None if the device has none.
        joins_steps: Whether torch joins the steps of several caches, see `batching.joining`.
        idle: Caches that are not in use; see `cache.idle.acquire`.
    """

    def __init__(
        self,
        model: nn.Module,
        exits: dict[int, NestedExit],
        packed: bool = True,
        graphs: bool | None = None,
        native: str | None = None,
        keep: bool = False,
    ):
        """Join or pack the model's matrices.

        Args:
            model: The transformers model; it must not be moved to another device afterwards.
            exits: Exits by depth.
            packed: Whether to keep a copy of each matrix in a format that a CPU reads faster.
            graphs: See the class; by default True if the device has graphs.
            native: Name of the kind of weights with which the compiled library runs the network;
                None: torch runs it.
            keep: Whether the model keeps its matrices if the compiled library has packed them.

        Raises:
            NativeError: The compiled library cannot run this network; the model is unchanged.
            SettingsError: The model's family is not supported.
        """
        config = model.config
        if config.model_type not in FAMILIES:
            raise SettingsError(
                f"model_type: {config.model_type} is not one of {', '.join(FAMILIES)}. "
                "Use transformers' own generate."
            )
        self.model, self.depths = model, tuple(sorted(exits))
        self.weights: Weights = (
            EagerWeights.of(model, exits, packed)
            if native is None
            else NativeWeights.of(model, exits, native, not keep)
        )
        self.num_layers = len(self.layers)
        self.make_recorder = None if self.is_native else graphs_of(self.device)
        self.graphs = self.make_recorder is not None if graphs is None else graphs
        self.joins_steps, self.idle = False, []
        self._whole = None if self.is_native and not keep else model

    def resized(self, vocab_size: int) -> "Network":
        """Return a network with a vocabulary padded to another size, which shares the layers.

        Tokens beyond the old size have zeros as embedding and are never chosen.
        """
        other = copy.copy(self)
        other.weights, other.idle = self.weights.resized(vocab_size), []
        return other

    @property
    def layers(self) -> Sequence[Any]:
        """Return the layers from shallow to deep."""
        return self.weights.layers

    @property
    def readouts(self) -> dict[int, Any]:
        """Return the readout of each exit, by depth."""
        return self.weights.readouts

    @property
    def embedding(self) -> Tensor:
        """Return the embedding, [v, h]."""
        return self.weights.embedding

    @property
    def is_native(self) -> bool:
        """Return whether the compiled library runs the network."""
        return self.weights.is_native

    @property
    def num_bytes(self) -> int:
        """Return the size of all weights."""
        return self.weights.num_bytes

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens of the vocabulary."""
        return self.embedding.size(0)

    @property
    def hidden_size(self) -> int:
        """Return the size of a hidden state."""
        return self.embedding.size(1)

    @property
    def max_positions(self) -> int:
        """Return the longest sequence that the model's config and a cache of its keys allow."""
        longest, constant = self.model.config.max_position_embeddings, self.rope.constant_tokens
        return longest if constant is None else min(longest, constant)

    @property
    def rope(self) -> Rope:
        """Return the rotary positions."""
        return self.weights.rope

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the data type that stands for the kind of weights; torch.int8 for int8."""
        return self.weights.dtype

    @property
    def kind(self) -> str:
        """Return the name of the kind of weights, such as bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def state_dtype(self) -> torch.dtype:
        """Return the data type of hidden states."""
        return self.weights.state_dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        """Return the data type of keys and values."""
        return self.weights.cache_dtype

    def new_cache(
        self, num_rows: int, capacity: int, stops: Sequence[int], passes: Passes | None = None
    ) -> BatchCache:
        """Return an empty cache, whose passes these weights run; arguments as for `BatchCache`."""
        return self.weights.cache_type(self.weights, num_rows, capacity, stops, passes)

    def whole_model(self) -> nn.Module:
        """Return the model with all weights, for transformers' own methods.

        Where the compiled library runs the network, the model is read again, once; int8 has no
        counterpart in transformers, and is float32 there.
        """
        if self._whole is None:
            dtype = self.dtype if self.dtype.is_floating_point else torch.float32
            model, _ = load_with_exits(Path(self.model.config.name_or_path), dtype)
            self._whole = model.requires_grad_(False)
        return self._whole

    def check_depth(self, depth: int, name: str) -> None:
        """Check that the model has an exit at ``depth``.

        Raises:
            SettingsError: It has none; the message begins with ``name``.
        """
        if depth not in self.readouts:
            raise SettingsError(
                f"{name}: depth {depth} is no exit of this model; its exits are "
                f"{', '.join(map(str, self.depths))}. Use one of them."
            )


def load_network(
    directory: str | Path,
    depths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    graphs: bool | None = None,
    native: str = "auto",
) -> Network:
    """Load the network of a Hugging Face directory; no code in the directory is executed.

    Args:
        directory: Directory with a config.json that names the exits (``exit_layer_indices``), else
            the full model is the only exit.
        depths: Exits to use instead; those that the directory does not name are read with the last
            norm and head.
        dtype: Data type of the weights; int8 for the compiled library alone.
        device: Device of the weights.
        graphs: Whether forward passes are recorded and replayed; by default if the device can.
        native: Whether the compiled library runs the network: "on", "off", or "auto": on a CPU,
            unless it cannot, or graphs are asked for.

    Raises:
        CheckpointError: The directory holds no intact model.
        SettingsError: The model is not supported, a depth is not one of its layers, or the compiled
            library is asked for and cannot run the network.
    """
    if graphs and native == "auto":
        native = "off"  # graphs are torch's
    kind = native_kind(native, dtype, device)
    # packed as it is stored: a copy in another type would only take more memory
    stored = dtype if kind in (None, "bfloat16") else None
    model, exits = load_with_exits(Path(directory), stored)
    last = model.config.num_hidden_layers
    for depth in depths or ():
        if not 1 <= depth <= last:
            raise SettingsError(
                f"depth {depth} is not a layer of this model, which has {last}. Use 1..{last}."
            )
        exits.setdefault(depth, NestedExit(model.model.norm, model.lm_head))
    if depths is not None:
        exits = {depth: own for depth, own in exits.items() if depth in depths or depth == last}
    parts = [part for own in exits.values() for part in (own.block, own.norm, own.head)]
    modules = [model, *(part for part in parts if part is not None)]
    for module in modules:
        module.to(device)
    model.requires_grad_(False).eval()
    if kind is not None:
        try:
            return Network(model, exits, native=kind)
        except NativeError as error:
            refuse_or_report(error, native, kind)
    if stored is None:
        for module in modules:
            module.to(dtype)
    return Network(model, exits, graphs=graphs)


def config_sha256(network: Network) -> str:
    """Return the SHA-256 of the config.json that a model was loaded with."""
    return hashlib.sha256(
        (Path(network.model.config.name_or_path) / CONFIG_FILE).read_bytes()
    ).hexdigest()


def draft_key(directory: Path, draft: Network) -> str:
    """Return the key of tuned options for a draft model: its directory's name and config hash."""
    return f"{directory.resolve().name}@{config_sha256(draft)[:16]}"
