"""Who takes part in a match: networks are loaded and servers started, and freed again."""

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lab.build_llama_cpp import LlamaPrograms
from lab.contests.contenders import (
    BY_TORCH,
    LLAMA,
    OURS,
    TRANSFORMERS,
    Contender,
    Entry,
    Llama,
    Ours,
    Transformers,
    packed_bytes,
    weights_read,
)
from lab.contests.gguf import KINDS, bytes_a_token, write_file
from megatron_sorted.decoding.network import Network, load_network
from megatron_sorted.decoding.strategies import SPECULATIVE, STRATEGIES, Full, Strategy
from megatron_sorted.decoding.texts import Limits
from megatron_sorted.decoding.tuning.tune import Tuning
from megatron_sorted.errors import PlatformError
from megatron_sorted.llama_cpp.server import LlamaServer, ServedModel

OUR_KINDS = ("float32", "bfloat16", "int8")
LOSSLESS = tuple(strategy.name for strategy in SPECULATIVE)
Options = dict[str, dict[str, Any]]
"""Options of strategies by their name."""


@dataclass(frozen=True)
class Peer:
    """How llama.cpp takes part.

    Attributes:
        build: Build of llama.cpp.
        folder: Folder of its files.
        context: Longest text.
        num_draft_tokens: Most tokens of a draft.
    """

    build: LlamaPrograms
    folder: Path
    context: int
    num_draft_tokens: int

    def file(self, model: Path, depth: int, kind: str) -> Path:
        """Return the GGUF file of a model's first layers, made unless it is there."""
        target = self.folder / f"{model.resolve().name}-{depth}-{kind}.gguf"
        return write_file(model, depth, kind, target, self.build)


class Entrants:
    """The contenders of one model and one number of threads.

    Attributes:
        model: Hugging Face directory.
        threads: Number of threads.
        peer: How llama.cpp takes part; None without it.
        networks: Our networks by kind of weights; the one that torch runs under "torch".
    """

    def __init__(self, model: Path, threads: int, peer: Peer | None):
        self.model, self.threads, self.peer = model, threads, peer
        torch.set_num_threads(threads)
        self.networks: dict[str, Network] = {}
        self.servers: list[LlamaServer] = []

    def network(self, kind: str) -> Network:
        """Return our network with a kind of weights, loaded at the first call."""
        if kind not in self.networks:
            self.networks[kind] = (
                load_network(self.model, native="off")
                if kind == "torch"
                else load_network(self.model, dtype=getattr(torch, kind), native="on")
            )
        return self.networks[kind]

    def ours(self, kinds: Sequence[str], tuned: Mapping[str, Options] | None) -> list[Contender]:
        """Return `full` by our library for each kind, and the tuned strategies of each kind."""
        contenders = []
        for kind in kinds:
            network = self.network(kind)
            strategies: dict[str, Strategy] = {"full": Full()}
            strategies |= strategies_of((tuned or {}).get(kind, {}))
            for name, strategy in strategies.items():
                entry = Entry(f"ours {kind} {name}", OURS, kind, name, packed_bytes(network))
                contenders.append(Ours(entry, network, strategy))
        return contenders

    def by_torch(self) -> list[Contender]:
        """Return `full` of our decoder by torch, and transformers, in float32."""
        network = self.network("torch")
        size = weights_read(network.model)
        return [
            Ours(Entry("ours by torch float32 full", BY_TORCH, "float32", "full", size), network,
                 Full()),
            Transformers(
                Entry("transformers float32", TRANSFORMERS, "float32", "full", size), network.model
            ),
        ]  # fmt: skip

    def llama(
        self, kinds: Sequence[str] = KINDS, slots: int = 1, draft_depth: int | None = None
    ) -> list[Contender]:
        """Return a server for each of llama.cpp's kinds of weights; [] without a build.

        Args:
            kinds: The kinds.
            slots: Number of texts at once.
            draft_depth: Number of layers of the model that drafts; None without one.
        """
        if self.peer is None:
            return []
        contenders, last = [], self.network("torch").num_layers
        for kind in kinds:
            file = self.peer.file(self.model, last, kind)
            draft = None if draft_depth is None else self.peer.file(self.model, draft_depth, kind)
            name = f"llama.cpp {kind}" + (", draft" if draft else "")
            name += f", {slots} slots" if slots > 1 else ""
            size = bytes_a_token(file)
            served = ServedModel(
                self.peer.build.programs / "llama-server", file, self.threads, self.peer.context,
                slots, "f32" if kind == "F32" else "f16", draft, self.peer.num_draft_tokens,
            )  # fmt: skip
            entry = Entry(name, LLAMA, kind, "draft" if draft else "full", size)
            contenders.append(Llama(entry, self._start(served)))
        return contenders

    def tuned(
        self, kinds: Sequence[str], prompts: Sequence[list[int]], num_tokens: int
    ) -> dict[str, Options]:
        """Return the best options of each lossless strategy for each kind of weights."""
        options = {}
        for kind in kinds:
            network = self.network(kind)
            generator = SimpleNamespace(
                network=network, draft=None, draft_for=lambda strategy: None
            )
            tuning = Tuning(
                generator, None, network.depths[:-1], prompts, Limits(max_new_tokens=num_tokens)
            )
            tuning.choose(1.0)
            options[kind] = {
                name: dataclasses.asdict(strategy)
                for name, strategy in tuning.choices.items()
                if name in LOSSLESS
            }
        return options

    def stop_servers(self) -> None:
        """End all servers."""
        for server in self.servers:
            server.stop()
        self.servers.clear()

    def close(self) -> None:
        """End all servers and free all networks."""
        self.stop_servers()
        self.networks.clear()
        gc.collect()

    def _start(self, served: ServedModel) -> LlamaServer:
        """Start a server, with the build for several tokens where the first one fails."""
        other = self.peer.build.programs_for_batches / "llama-server"
        try:
            server = LlamaServer(served)
        except PlatformError:
            if other == served.program:
                raise
            server = LlamaServer(dataclasses.replace(served, program=other))
        self.servers.append(server)
        return server


def strategies_of(options: Options) -> dict[str, Strategy]:
    """Return lossless strategies from their options, as decoding.json stores them.

    >>> strategies_of({"self_speculative": {"depth": 2}, "early_exit": {}})
    {'self_speculative': SelfSpeculative(depth=2, num_draft_tokens=4)}
    """
    return {
        name: STRATEGIES[name](
            **{key: tuple(one) if isinstance(one, list) else one for key, one in values.items()}
        )
        for name, values in options.items()
        if name in LOSSLESS
    }


def draft_depth_of(options: Options, network: Network) -> int | None:
    """Return the exit with which self-speculation drafts, else the first; None without."""
    chosen = options.get("self_speculative", {}).get("depth")
    return chosen or next(iter(network.depths[:-1]), None)
