"""What an intermediate exit may own between its hidden state and its norm: a low-rank adapter, then a layer or an MLP.

A layer per exit is Balcony's (arXiv 2503.05005), an MLP per exit EE-Tuning's (arXiv 2402.00518). Both are Megatron's own modules.
"""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_sorted.platform.state import current_device, random_tracker
from megatron_sorted.platform.versions import chunk_arguments
from megatron_sorted.settings.layout import ChunkLayout
from megatron_sorted.settings.run import Settings

PARTS = ("exit_adapters", "exit_blocks", "exit_mlps")
"""Names of the parts within a stage, in the order in which a hidden state meets them."""


class ExitAdapter(torch.nn.Module):
    """Adds ``up(down(hidden))`` of a low rank to a hidden state: LoRA (Hu et al., arXiv 2106.09685, eq. 3) around the whole network below.

    Both matrices are whole on every tensor parallel rank. Under sequence parallelism each rank sees its tokens only; marked parameters
    have their gradients added up over the tensor parallel group by Megatron. It begins as nothing: ``up`` is zero.
    """

    def __init__(self, config: TransformerConfig, rank: int):
        super().__init__()
        options = {"bias": False, "dtype": config.params_dtype, "device": current_device()}
        self.down = torch.nn.Linear(config.hidden_size, rank, **options)
        self.up = torch.nn.Linear(rank, config.hidden_size, **options)
        config.init_method(self.down.weight)
        torch.nn.init.zeros_(self.up.weight)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_tbh: torch.Tensor) -> torch.Tensor:
        """Return the hidden state with the adapter's part added; shape [t, b, h]."""
        return hidden_tbh + self.up(self.down(hidden_tbh))


def mlp_spec(layer: ModuleSpec) -> ModuleSpec:
    """Return the specification of a layer without attention: norm, MLP and residual, saved under the names of the MLP alone."""
    parts = layer.submodules
    return ModuleSpec(
        module=layer.module,
        params=layer.params,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=parts.pre_mlp_layernorm,
            mlp=parts.mlp,
            mlp_bda=parts.mlp_bda,
            sharded_state_dict_keys_map={
                "mlp.": "",
                "pre_mlp_layernorm.": "linear_fc1.layer_norm_",
            },
        ),
    )


def without_recomputation(config: TransformerConfig) -> TransformerConfig:
    """Return the configuration for an exit's layer: it runs when its backward is due, so nothing is kept that could be computed again.

    Megatron's recomputation refuses ``torch.autograd.grad``, by which exits are computed.
    """
    plain = copy.copy(config)
    plain.recompute_granularity = plain.recompute_method = plain.recompute_num_layers = None
    return plain


def make_parts(
    settings: Settings,
    config: TransformerConfig,
    spec: ModuleSpec,
    plan: ChunkLayout,
    vp_stage: int | None,
) -> dict[str, torch.nn.ModuleDict]:
    """Return the parts of a chunk's intermediate exits, by name (``PARTS``) and depth, with Megatron's initial weights.

    Args:
        settings: The run.
        config: Megatron's configuration of it.
        spec: What a layer is made of.
        plan: What the chunk holds.
        vp_stage: As for the chunk's block.
    """

    def layer(of: ModuleSpec, depth: int) -> torch.nn.Module:
        # Megatron adds the layers before the chunk to the number, which then is the exit's depth
        return build_module(
            of,
            config=without_recomputation(config),
            layer_number=depth - plan.first_layer,
            **chunk_arguments(TransformerLayer.__init__, vp_stage),
        )

    rank, depths = settings.exit_adapter_rank, plan.intermediate
    adapters = {str(depth): ExitAdapter(config, rank) for depth in depths if rank}
    blocks = {str(depth): layer(spec, depth) for depth in depths if settings.use_exit_block}
    mlps = {str(depth): layer(mlp_spec(spec), depth) for depth in depths if settings.use_exit_mlp}
    return {
        name: torch.nn.ModuleDict(parts)
        for name, parts in zip(PARTS, (adapters, blocks, mlps), strict=True)
    }


@dataclass(frozen=True)
class ExitReader:
    """Makes of an exit's un-normed hidden state what its head reads: in place of the norm of an exit that has parts.

    Attributes:
        adapter: Of low rank; None where there is none.
        layer: Block or MLP, a layer of Megatron's; None where there is none.
        norm: The norm that reads the exit.
        attention_mask: Of the micro-batch.
        rotary: Of the micro-batch.
        sequence_parallel: Whether hidden states are sharded along the sequence.
    """

    adapter: torch.nn.Module | None
    layer: torch.nn.Module | None
    norm: torch.nn.Module
    attention_mask: torch.Tensor | None
    rotary: torch.Tensor | None
    sequence_parallel: bool

    def __call__(self, hidden_tbh: torch.Tensor) -> torch.Tensor:
        """Return the normed hidden state [t, b, h].

        Collective: those of the layer (tensor parallel group).
        """
        if self.adapter is not None:
            hidden_tbh = self.adapter(hidden_tbh)
        if self.layer is not None:
            # as Megatron's block does for its layers: dropout differs between ranks that hold different tokens
            with random_tracker().fork() if self.sequence_parallel else nullcontext():
                hidden_tbh, _ = self.layer(
                    hidden_tbh, attention_mask=self.attention_mask, rotary_pos_emb=self.rotary
                )
        return self.norm(hidden_tbh)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the parameters of parts and norm."""
        for module in (self.adapter, self.layer, self.norm):
            if module is not None:
                yield from module.parameters()
