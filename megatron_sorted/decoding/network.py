"""A nested model ready to decode: its layers, and what reads the hidden state at each of its exits."""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_sorted.conversion.hugging_face.families import CONFIG
from megatron_sorted.conversion.hugging_face.nested_exits import Exit, ExitBlock, ExitNorm
from megatron_sorted.decoding.cache.layer import Layer, norm
from megatron_sorted.decoding.cache.matrix import Matrices, Matrix
from megatron_sorted.errors import SettingsError
from megatron_sorted.exported.load import load_with_exits
from megatron_sorted.platform.graphs import graphs_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
UNKNOWN_ROTATIONS = ("dynamic", "longrope")
"""Rotations that depend on the length of the text, so keys in a cache would be those of another length."""


@dataclass(frozen=True)
class ExitReadout:
    """What an exit makes of the hidden state after its layers.

    Attributes:
        norm: Before the head; may hold an MLP or adapter of the exit's own.
        head: To the vocabulary.
        block: A layer of the exit's own before the norm, with keys and values of its own; else None.
        adapter: Before the block.
    """

    norm: nn.Module
    head: Matrix
    block: Layer | None = None
    adapter: nn.Module | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., v] of hidden states [..., h] that have been through the block, if any."""
        normed = self.norm(hidden) if isinstance(self.norm, ExitNorm) else norm(hidden, self.norm)
        return self.head(normed)


class Network:
    """Layers and exits of a model of transformers, whose weights it shares.

    Attributes:
        model: The model; it stays usable.
        depths: Of its exits, increasing; the last is the full model.
        layers: Shallow to deep.
        readers: By depth.
        graphs: Whether passes are told on the device where tokens stand, so that it can record and replay them.
        make_recorder: Of such passes; None where the device has no graphs.
        idle: Memory that nobody uses; `memory.lend` lends it.
    """

    def __init__(
        self,
        model: nn.Module,
        exits: dict[int, Exit],
        packed: bool = True,
        graphs: bool | None = None,
    ):
        """Join the model's matrices.

        Args:
            model: Of transformers; it must not be moved afterwards.
            exits: By depth.
            packed: Whether to keep a copy of each matrix that a CPU reads faster.
            graphs: See the class; by default where the device has them.

        Raises:
            SettingsError: The model is of a family, or has rotations, that this does not know.
        """
        config = model.config
        if config.model_type not in FAMILIES:
            raise SettingsError(
                f"model_type: {config.model_type} is not one of {', '.join(FAMILIES)}. Use transformers' own generate."
            )
        kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if kind in UNKNOWN_ROTATIONS:
            raise SettingsError(
                f"rope_type: {kind} rotates by the length of the text, which a cache cannot follow. "
                "Use transformers' own generate."
            )
        self.model, self.depths = model, tuple(sorted(exits))
        matrices = Matrices(packed)
        self.layers = [
            Layer(layer, matrices, window_of(config, index))
            for index, layer in enumerate(model.model.layers)
        ]
        self.readers = {
            depth: make_reader(config, depth, found, matrices) for depth, found in exits.items()
        }
        self.embedding = model.get_input_embeddings().weight
        self.rotary, self.num_layers = model.model.rotary_emb, len(self.layers)
        self.make_recorder = graphs_of(self.device)
        self.graphs = self.make_recorder is not None if graphs is None else graphs
        self.idle: list = []

    def resized(self, vocab_size: int) -> "Network":
        """Return the network with so many tokens, whose layers it shares: of the same tokenizer, filled up to another size.

        Tokens that it lacks are read as zeros and never said.
        """
        other = copy.copy(self)
        lacking = vocab_size - self.vocab_size
        other.embedding = (
            F.pad(self.embedding, (0, 0, 0, lacking))
            if lacking > 0
            else self.embedding[:vocab_size]
        )
        heads = {
            id(reader.head): reader.head.resized(vocab_size) for reader in self.readers.values()
        }
        other.readers = {
            depth: replace(reader, head=heads[id(reader.head)])
            for depth, reader in self.readers.items()
        }
        other.idle = []
        return other

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens."""
        return self.embedding.size(0)

    @property
    def hidden_size(self) -> int:
        """Return the numbers of a hidden state."""
        return self.embedding.size(1)

    @property
    def max_positions(self) -> int:
        """Return the longest sequence that the model's config allows."""
        return self.model.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Its kind of numbers."""
        return self.embedding.dtype

    def check_depth(self, depth: int, name: str) -> None:
        """Check that there is an exit at ``depth``.

        Raises:
            SettingsError: There is none; ``name`` says whose value it is.
        """
        if depth not in self.readers:
            raise SettingsError(
                f"{name}: depth {depth} is no exit of this model; its exits are {', '.join(map(str, self.depths))}. "
                "Use one of them."
            )


def window_of(config, index: int) -> int | None:
    """Return how far back layer ``index`` sees; None for all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return config.sliding_window if kinds[index] == "sliding_attention" else None
    return getattr(config, "sliding_window", None)


def make_reader(config, depth: int, found: Exit, matrices: Matrices) -> ExitReadout:
    """Return the reader of an exit."""
    head = matrices.of(found.head)
    if found.block is None:
        return ExitReadout(found.norm, head)
    module, adapter = (
        (found.block.layer, found.block.adapter)
        if isinstance(found.block, ExitBlock)
        else (found.block, None)
    )
    return ExitReadout(
        found.norm,
        head,
        Layer(module, matrices, window_of(config, min(depth, config.num_hidden_layers - 1))),
        adapter,
    )


def load_network(
    directory: str | Path,
    depths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    graphs: bool | None = None,
) -> Network:
    """Return the network of a Hugging Face directory; nothing in the directory is executed.

    Args:
        directory: With config.json; exits are those it names (``exit_layer_indices``), else the full model alone.
        depths: Exits to use instead; those that the directory does not know are read by the last one's norm and head.
        dtype: Kind of numbers.
        device: Where to.
        graphs: Whether passes are recorded by the device and replayed; by default where it can.

    Raises:
        CheckpointError: It holds no intact model.
        SettingsError: The model cannot be decoded here, or a depth is not one of its layers.
    """
    model, exits = load_with_exits(Path(directory), dtype)
    last = model.config.num_hidden_layers
    for depth in depths or ():
        if not 1 <= depth <= last:
            raise SettingsError(
                f"depth {depth} is not a layer of this model, which has {last}. Use 1..{last}."
            )
        exits.setdefault(depth, Exit(model.model.norm, model.lm_head))
    if depths is not None:
        exits = {depth: found for depth, found in exits.items() if depth in depths or depth == last}
    for found in exits.values():
        for part in (found.block, found.norm, found.head):
            if part is not None:
                part.to(device)
    return Network(model.to(device).requires_grad_(False).eval(), exits, graphs=graphs)


def config_sha256(network: Network) -> str:
    """Return the hash of the config.json that a model was loaded with."""
    return hashlib.sha256(
        (Path(network.model.config.name_or_path) / CONFIG).read_bytes()
    ).hexdigest()


def draft_key(directory: Path, draft: Network) -> str:
    """Return what the choices made with a draft model are kept under: its directory's name, and of which config.json it is."""
    return f"{directory.resolve().name}@{config_sha256(draft)[:16]}"
