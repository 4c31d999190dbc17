"""A nested model prepared for decoding: its layers, and the readout of each exit."""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_sorted.conversion.hugging_face.families import CONFIG_FILE, FAMILIES, attention_window
from megatron_sorted.conversion.hugging_face.nested_exits import ExitBlock, ExitNorm, NestedExit
from megatron_sorted.decoding.cache.layer import Layer, norm
from megatron_sorted.decoding.cache.matrix import Matrices, Matrix
from megatron_sorted.decoding.native.choice import native_kind, refuse_or_report
from megatron_sorted.decoding.native.compiler import NativeError
from megatron_sorted.decoding.native.network import NativeNetwork
from megatron_sorted.errors import SettingsError
from megatron_sorted.exported.load import load_with_exits
from megatron_sorted.platform.graphs import graphs_of

UNKNOWN_ROTATIONS = ("dynamic", "longrope")
"""Rotary embeddings that depend on the text's length, so that cached keys would become wrong."""


@dataclass(frozen=True)
class ExitReadout:
    """The modules that turn the hidden state at an exit into logits.

    Attributes:
        norm: Norm before the head; it may hold an MLP or adapter of the exit's own.
        head: Output matrix.
        block: The exit's own layer before the norm, with its own KV cache; None without one.
        adapter: The exit's own adapter before the block; None without one.
    """

    norm: nn.Module
    head: Matrix
    block: Layer | None = None
    adapter: nn.Module | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., v] of hidden states [..., h] after the block, if there is one."""
        normed = self.norm(hidden) if isinstance(self.norm, ExitNorm) else norm(hidden, self.norm)
        return self.head(normed)


class Network:
    """The layers and exits of a transformers model, whose weights it shares.

    Attributes:
        model: The model; it stays usable.
        depths: Depths of its exits, increasing; the last is the full model.
        layers: Layers from shallow to deep.
        readouts: Readout of each exit, by depth.
        graphs: Whether forward passes take the tokens' positions from the device, so that they can
            be recorded as graphs and replayed.
        make_recorder: Function that makes a recorder of graphs; None if the device has none.
        idle: Caches that are not in use; see `cache.memory.acquire`.
    """

    def __init__(
        self,
        model: nn.Module,
        exits: dict[int, NestedExit],
        packed: bool = True,
        graphs: bool | None = None,
        native: str | None = None,
    ):
        """Join the model's matrices.

        Args:
            model: The transformers model; it must not be moved to another device afterwards.
            exits: Exits by depth.
            packed: Whether to keep a copy of each matrix in a format that a CPU reads faster.
            graphs: See the class; by default True if the device has graphs.
            native: Name of the kind of weights with which the compiled library runs the network;
                None: torch runs it.

        Raises:
            NativeError: The compiled library cannot run this network.
            SettingsError: The model's family or rotary embedding is not supported.
        """
        config = model.config
        if config.model_type not in FAMILIES:
            raise SettingsError(
                f"model_type: {config.model_type} is not one of {', '.join(FAMILIES)}. "
                "Use transformers' own generate."
            )
        kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if kind in UNKNOWN_ROTATIONS:
            raise SettingsError(
                f"rope_type: {kind} rotates by the length of the text, which a cache cannot "
                "follow. Use transformers' own generate."
            )
        self.model, self.depths, self.native = model, tuple(sorted(exits)), None
        if native is not None:
            self.native = NativeNetwork(model, exits, native)
            self.layers, self.readouts = self.native.layers, self.native.readouts
            self.embedding = self.native.embedding
        else:
            matrices = Matrices(packed)
            self.layers = [
                Layer(layer, matrices, attention_window(config, index))
                for index, layer in enumerate(model.model.layers)
            ]
            self.readouts = {
                depth: make_readout(config, depth, own, matrices) for depth, own in exits.items()
            }
            self.embedding = model.get_input_embeddings().weight
        self.rotary, self.num_layers = model.model.rotary_emb, len(self.layers)
        self.make_recorder = graphs_of(self.device)
        self.graphs = self.make_recorder is not None if graphs is None else graphs
        self.idle: list = []

    def resized(self, vocab_size: int) -> "Network":
        """Return a network with a vocabulary padded to another size, which shares the layers.

        Tokens beyond the old size have zeros as embedding and are never chosen.
        """
        other = copy.copy(self)
        missing = vocab_size - self.vocab_size
        other.embedding = (
            F.pad(self.embedding, (0, 0, 0, missing))
            if missing > 0
            else self.embedding[:vocab_size]
        )
        other.idle = []
        if self.native is not None:
            other.readouts = self.native.resized(vocab_size)
            return other
        heads = {
            id(readout.head): readout.head.resized(vocab_size) for readout in self.readouts.values()
        }
        other.readouts = {
            depth: replace(readout, head=heads[id(readout.head)])
            for depth, readout in self.readouts.items()
        }
        return other

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
        """Return the longest sequence that the model's config allows."""
        return self.model.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the data type of the weights."""
        return self.embedding.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """Return the data type of hidden states, keys and values."""
        return self.dtype if self.native is None else torch.float32

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


def make_readout(config, depth: int, own: NestedExit, matrices: Matrices) -> ExitReadout:
    """Return the readout of an exit with these modules."""
    head = matrices.of(own.head)
    if own.block is None:
        return ExitReadout(own.norm, head)
    module, adapter = own.block, None
    if isinstance(module, ExitBlock):
        module, adapter = module.layer, module.adapter
    window = attention_window(config, min(depth, config.num_hidden_layers - 1))
    return ExitReadout(own.norm, head, Layer(module, matrices, window), adapter)


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
        SettingsError: The model is not supported, a depth is not one of its layers, or the
            compiled library is needed and cannot be used.
    """
    if graphs and native == "auto":
        native = "off"  # graphs are torch's
    kind = native_kind(native, dtype, device)
    model, exits = load_with_exits(
        Path(directory), dtype if dtype.is_floating_point else torch.float32
    )
    last = model.config.num_hidden_layers
    for depth in depths or ():
        if not 1 <= depth <= last:
            raise SettingsError(
                f"depth {depth} is not a layer of this model, which has {last}. Use 1..{last}."
            )
        exits.setdefault(depth, NestedExit(model.model.norm, model.lm_head))
    if depths is not None:
        exits = {depth: own for depth, own in exits.items() if depth in depths or depth == last}
    for own in exits.values():
        for module in (own.block, own.norm, own.head):
            if module is not None:
                module.to(device)
    model = model.to(device).requires_grad_(False).eval()
    if kind is not None:
        try:
            return Network(model, exits, graphs=False, native=kind)
        except NativeError as error:
            refuse_or_report(error, native, kind)
    return Network(model, exits, graphs=graphs)


def config_sha256(network: Network) -> str:
    """Return the SHA-256 of the config.json that a model was loaded with."""
    return hashlib.sha256(
        (Path(network.model.config.name_or_path) / CONFIG_FILE).read_bytes()
    ).hexdigest()


def draft_key(directory: Path, draft: Network) -> str:
    """Return the key of tuned options for a draft model: its directory's name and config hash."""
    return f"{directory.resolve().name}@{config_sha256(draft)[:16]}"
