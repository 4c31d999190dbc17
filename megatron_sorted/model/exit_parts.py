"""Parts of an intermediate exit between its hidden state and its norm.

They are a low-rank adapter, then a layer or an MLP. A layer per exit is Balcony's (arXiv
2503.05005), an MLP per exit EE-Tuning's (arXiv 2402.00518). Both are Megatron's own modules.
"""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_sorted.platform.state import current_device, random_tracker
from megatron_sorted.settings.exit_parts import PARTS
from megatron_sorted.settings.layout import ChunkLayout
from megatron_sorted.settings.run import Settings


class ExitAdapter(torch.nn.Module):
    """A low-rank update of a hidden state: h + up(down(h)).

    It is LoRA (Hu et al., arXiv 2106.09685, eq. 3) around the whole network below. Every tensor
    parallel rank holds both matrices whole. Under sequence parallelism each rank sees its tokens
    only; Megatron sums the gradients of marked parameters over the tensor parallel group. ``up``
    starts as zero, so at first the adapter changes nothing.
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
        """Return the updated hidden state; shape [t, b, h]."""
        return hidden_tbh + self.up(self.down(hidden_tbh))


def mlp_spec(layer: ModuleSpec) -> ModuleSpec:
    """Return the specification of a layer without attention: norm, MLP and residual.

    Its parameters are saved under the names of the MLP alone.
    """
    submodules = layer.submodules
    return ModuleSpec(
        module=layer.module,
        params=layer.params,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=submodules.pre_mlp_layernorm,
            mlp=submodules.mlp,
            mlp_bda=submodules.mlp_bda,
            sharded_state_dict_keys_map={
                "mlp.": "",
                "pre_mlp_layernorm.": "linear_fc1.layer_norm_",
            },
        ),
    )


def without_recomputation(config: TransformerConfig) -> TransformerConfig:
    """Return the configuration of an exit's layer: that of other layers, without recomputation.

    An exit's layer runs only when its backward is due, so its activations are short-lived anyway;
    and Megatron's recomputation refuses ``torch.autograd.grad``, which computes exits.
    """
    plain = copy.copy(config)
    plain.recompute_granularity = plain.recompute_method = plain.recompute_num_layers = None
    return plain


def make_parts(
    settings: Settings,
    config: TransformerConfig,
    spec: ModuleSpec,
    layout: ChunkLayout,
    vp_stage: int | None,
    groups: ProcessGroupCollection,
) -> dict[str, torch.nn.ModuleDict]:
    """Build the parts of a chunk's intermediate exits, with Megatron's initial weights.

    Args:
        settings: The run's settings.
        config: Megatron's configuration of the run.
        spec: Specification of a transformer layer.
        layout: What the chunk holds.
        vp_stage: Megatron's number of the chunk on this rank; None if the rank holds one chunk.
        groups: Megatron's process groups.

    Returns:
        {name of the part, one of ``PARTS``: {depth: module}}.
    """

    def build_layer(layer: ModuleSpec, depth: int) -> torch.nn.Module:
        # Megatron adds the layers before the chunk to the number, which then is the exit's depth
        return build_module(
            layer,
            config=without_recomputation(config),
            layer_number=depth - layout.layers_before,
            pg_collection=groups,
            vp_stage=vp_stage,
        )

    rank, depths = settings.exit_adapter_rank, layout.intermediate
    adapters = {str(depth): ExitAdapter(config, rank) for depth in depths if rank}
    blocks = {str(depth): build_layer(spec, depth) for depth in depths if settings.use_exit_block}
    mlps = {
        str(depth): build_layer(mlp_spec(spec), depth) for depth in depths if settings.use_exit_mlp
    }
    return {
        name: torch.nn.ModuleDict(parts)
        for name, parts in zip(PARTS, (adapters, blocks, mlps), strict=True)
    }


@dataclass(frozen=True)
class NormWithParts:
    """The norm of an exit with the exit's own parts before it; called as the norm alone would be.

    Attributes:
        adapter: The low-rank adapter; None for an exit without one.
        layer: The block or MLP, a layer of Megatron's; None for an exit without one.
        norm: The norm that reads the exit.
        attention_mask: Attention mask of the micro-batch.
        rotary: Rotary angles of the micro-batch.
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
            # as Megatron's block does: ranks with different tokens use different dropout
            with random_tracker().fork() if self.sequence_parallel else nullcontext():
                hidden_tbh, _ = self.layer(
                    hidden_tbh, attention_mask=self.attention_mask, rotary_pos_emb=self.rotary
                )
        return self.norm(hidden_tbh)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the parameters of the parts and the norm."""
        for module in (self.adapter, self.layer, self.norm):
            if module is not None:
                yield from module.parameters()
