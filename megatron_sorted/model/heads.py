"""The modules that read the exits of one model chunk: norms, output matrices, exits' own parts.

The *readout* of an exit turns its hidden state into logits: the exit's own parts, a norm and an
output matrix.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from megatron_sorted.model.exit_parts import NormWithParts
from megatron_sorted.model.norm import Norm
from megatron_sorted.settings.exit_parts import PARTS
from megatron_sorted.settings.layout import ChunkLayout


@dataclass(frozen=True)
class ExitReadout:
    """The readout of an exit for one micro-batch.

    Attributes:
        norm: The norm, with the exit's own parts before it.
        weight_ph: The output matrix, this rank's shard of the vocabulary.
    """

    norm: torch.nn.Module | NormWithParts
    weight_ph: torch.nn.Parameter


@dataclass(frozen=True)
class ReadoutModules:
    """The modules that read one exit.

    Attributes:
        norm: The exit's own norm or the shared one.
        output: The module whose weight is the exit's output matrix: its own, the shared one, or the
            embedding.
        adapter, block, mlp: The exit's own parts; None for each that it has not.
    """

    norm: torch.nn.Module
    output: torch.nn.Module
    adapter: torch.nn.Module | None
    block: torch.nn.Module | None
    mlp: torch.nn.Module | None

    @property
    def parts(self) -> tuple[torch.nn.Module, ...]:
        """Return the exit's own parts, in the order in which a hidden state passes them."""
        return tuple(part for part in (self.adapter, self.block, self.mlp) if part is not None)


def _output_layer(
    config: TransformerConfig, vocab_size: int, groups: ProcessGroupCollection
) -> tensor_parallel.ColumnParallelLinear:
    return tensor_parallel.ColumnParallelLinear(
        config.hidden_size,
        vocab_size,
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        tp_group=groups.tp,
    )


class Heads:
    """The modules that read the exits of a chunk.

    Modules that exits share belong to the rank's first chunk that reads them.

    Attributes:
        made: {name in the chunk: module} of the modules that belong to this chunk, which registers
            them.
        norm, output: The shared norm, and the module of the shared output matrix; None where no
            chunk so far reads it.
        by_depth: {depth: modules of that exit}.
    """

    def __init__(
        self,
        layout: ChunkLayout,
        config: TransformerConfig,
        vocab_size: int,
        groups: ProcessGroupCollection,
        parts: Mapping[str, torch.nn.ModuleDict],
        embedding: torch.nn.Module | None,
        earlier: tuple["Heads", ...],
    ):
        """Build the norms and output matrices of a chunk.

        Args:
            layout: What the chunk holds.
            config: Megatron's configuration.
            vocab_size: Size of the padded vocabulary.
            groups: Megatron's process groups.
            parts: The exits' own parts, by name and depth.
            embedding: The chunk's embedding where the shared output matrix is tied to it.
            earlier: Heads of this rank's earlier chunks.
        """

        def make_norm() -> torch.nn.Module:
            return Norm(config, config.hidden_size, config.layernorm_epsilon)

        self.layout, self._tied = layout, embedding is not None
        norms = torch.nn.ModuleDict({str(depth): make_norm() for depth in layout.exit_norms})
        outputs = torch.nn.ModuleDict(
            {str(depth): _output_layer(config, vocab_size, groups) for depth in layout.exit_heads}
        )
        self.made: dict[str, torch.nn.Module] = {"exit_norms": norms, "exit_output_layers": outputs}
        self.norm = next((heads.norm for heads in earlier if heads.norm is not None), None)
        if layout.owns_norm:
            self.norm = self.made["final_layernorm"] = make_norm()
        self.output = next(
            (heads.output for heads in earlier if heads.output is not None), embedding
        )
        if layout.owns_head and not self._tied:
            self.output = self.made["output_layer"] = _output_layer(config, vocab_size, groups)
        own_norms, own_outputs, *own_parts = (
            dict(modules) for modules in (norms, outputs, *(parts[name] for name in PARTS))
        )
        self.by_depth = {
            depth: ReadoutModules(
                own_norms.get(str(depth), self.norm),
                own_outputs.get(str(depth), self.output),
                *(part.get(str(depth)) for part in own_parts),
            )
            for depth in layout.exits
        }

    @property
    def outputs(self) -> list[torch.nn.Module]:
        """Return the modules of this chunk that hold only an output matrix."""
        return [
            *self.made["exit_output_layers"].values(),
            *([self.made["output_layer"]] if "output_layer" in self.made else []),
        ]

    def shared_parameters(self) -> dict[str, list[torch.nn.Parameter]]:
        """Return {"head" or "norm": this chunk's parameters that other stages may copy}."""
        return {
            "head": [self.output.weight] if self.layout.owns_head else [],
            "norm": list(self.norm.parameters()) if self.layout.owns_norm else [],
        }

    def complete_at(self, depth: int) -> tuple[torch.nn.Parameter, ...]:
        """Return the parameters whose gradient is complete once the exit has run backward.

        Backward passes exits from deep to shallow, and a rank's first chunk last; so parameters
        that several exits of this rank share are complete at the shallowest exit of the chunk that
        owns them. A tied embedding is not listed: its lookup runs last.
        """
        modules, layout = self.by_depth[depth], self.layout
        complete = list(modules.norm.parameters()) if depth in layout.exit_norms else []
        if depth in layout.exit_heads:
            complete.append(modules.output.weight)
        for part in modules.parts:
            complete += part.parameters()
        if depth == layout.exits[0]:
            shared = self.shared_parameters()
            complete += shared["norm"] + ([] if self._tied else shared["head"])
        return tuple(parameter for parameter in complete if parameter.requires_grad)
