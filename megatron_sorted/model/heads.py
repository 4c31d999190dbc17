"""Which modules read the exits of one chunk: norms, output matrices, exits' own parts."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig

from megatron_sorted.model.exit_parts import PARTS, ExitReader
from megatron_sorted.model.norm import Norm
from megatron_sorted.settings.layout import ChunkLayout


@dataclass(frozen=True)
class Head:
    """How an exit is read.

    Attributes:
        norm: The norm, with the exit's own parts before it.
        weight_ph: The output matrix, this rank's shard of the vocabulary.
    """

    norm: torch.nn.Module | ExitReader
    weight_ph: torch.nn.Parameter


@dataclass(frozen=True)
class ExitModules:
    """The modules that read one exit.

    Attributes:
        norm: Its own norm or the shared one.
        output: The module whose weight is its output matrix: its own, the shared one, or the
            embedding.
        adapter, block, mlp: Its own parts; None where it has none.
    """

    norm: torch.nn.Module
    output: torch.nn.Module
    adapter: torch.nn.Module | None
    block: torch.nn.Module | None
    mlp: torch.nn.Module | None

    @property
    def parts(self) -> tuple[torch.nn.Module, ...]:
        """Return the exit's own parts, in the order in which a hidden state meets them."""
        return tuple(part for part in (self.adapter, self.block, self.mlp) if part is not None)


def _output_layer(
    config: TransformerConfig, vocab_size: int
) -> tensor_parallel.ColumnParallelLinear:
    return tensor_parallel.ColumnParallelLinear(
        config.hidden_size,
        vocab_size,
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
    )


class Heads:
    """Which modules read each exit of a chunk.

    What exits share lives in the rank's first chunk that reads it.

    Attributes:
        made: {name in the stage: module} of what this chunk holds; the stage registers it.
        norm, output: The shared norm, and the module of the shared output matrix; None where no
            chunk so far reads it.
        by_depth: {depth: the modules of that exit}.
    """

    def __init__(
        self,
        plan: ChunkLayout,
        config: TransformerConfig,
        vocab_size: int,
        parts: Mapping[str, torch.nn.ModuleDict],
        embedding: torch.nn.Module | None,
        earlier: tuple["Heads", ...],
    ):
        """Make the norms and output matrices of a chunk.

        Args:
            plan: What the chunk holds.
            config: Megatron's configuration.
            vocab_size: Padded vocabulary.
            parts: The exits' own parts, by name and depth.
            embedding: The chunk's embedding where the shared output matrix is tied to it.
            earlier: Those of this rank's earlier chunks.
        """

        def make_norm() -> torch.nn.Module:
            return Norm(config, config.hidden_size, config.layernorm_epsilon)

        self.plan, self._tied = plan, embedding is not None
        norms = torch.nn.ModuleDict({str(depth): make_norm() for depth in plan.exit_norms})
        outputs = torch.nn.ModuleDict(
            {str(depth): _output_layer(config, vocab_size) for depth in plan.exit_heads}
        )
        self.made: dict[str, torch.nn.Module] = {"exit_norms": norms, "exit_output_layers": outputs}
        self.norm = next((heads.norm for heads in earlier if heads.norm is not None), None)
        if plan.owns_norm:
            self.norm = self.made["final_layernorm"] = make_norm()
        self.output = next(
            (heads.output for heads in earlier if heads.output is not None), embedding
        )
        if plan.owns_head and not self._tied:
            self.output = self.made["output_layer"] = _output_layer(config, vocab_size)
        own_norms, own_outputs, *own_parts = (
            dict(modules) for modules in (norms, outputs, *(parts[name] for name in PARTS))
        )
        self.by_depth = {
            depth: ExitModules(
                own_norms.get(str(depth), self.norm),
                own_outputs.get(str(depth), self.output),
                *(part.get(str(depth)) for part in own_parts),
            )
            for depth in plan.exits
        }

    @property
    def outputs(self) -> list[torch.nn.Module]:
        """Return the modules of this chunk that hold an output matrix and nothing else."""
        return [
            *self.made["exit_output_layers"].values(),
            *([self.made["output_layer"]] if "output_layer" in self.made else []),
        ]

    def shared_parameters(self) -> dict[str, list[torch.nn.Parameter]]:
        """Return the parameters of this chunk that other stages may hold copies of, by kind."""
        return {
            "head": [self.output.weight] if self.plan.owns_head else [],
            "norm": list(self.norm.parameters()) if self.plan.owns_norm else [],
        }

    def complete_at(self, depth: int) -> tuple[torch.nn.Parameter, ...]:
        """Return the parameters whose gradient is complete once the exit has run backward.

        Backward passes exits from deep to shallow, and a rank's first chunk last; so what several
        exits of this rank share is complete at the shallowest exit of the chunk that owns it. A
        tied
        embedding is not listed: its lookup runs last.
        """
        own, plan = self.by_depth[depth], self.plan
        complete = list(own.norm.parameters()) if depth in plan.exit_norms else []
        if depth in plan.exit_heads:
            complete.append(own.output.weight)
        for part in own.parts:
            complete += part.parameters()
        if depth == plan.exits[0]:
            shared = self.shared_parameters()
            complete += shared["norm"] + ([] if self._tied else shared["head"])
        return tuple(parameter for parameter in complete if parameter.requires_grad)
