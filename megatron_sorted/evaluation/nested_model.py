"""A model with transformers, its exits in one forward pass, and every sub-model as a transformers model."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_sorted.conversion.nested_exits import Exit, greedy, shallow_model
from megatron_sorted.exported.load import load_with_exits
from megatron_sorted.exported.model_directory import plan_exits


class NestedModel:
    """A causal language model of transformers and its exits.

    Attributes:
        name: What tables and pictures call it.
        model: The full model.
        depths: Its exits, increasing; the last is the full model.
        norms, heads: Of every exit; the model's own modules where they are shared. An exit's own MLP or adapter is part of its norm.
        blocks: Of exits with a layer of their own before their norm.
    """

    def __init__(self, name: str, model: nn.Module, depths: Sequence[int], norms: dict[int, nn.Module] | None = None,
                 heads: dict[int, nn.Module] | None = None, blocks: dict[int, nn.Module] | None = None):
        self.name, self.model, self.depths = name, model, tuple(depths)
        self.norms = {depth: (norms or {}).get(depth, model.model.norm) for depth in depths}
        self.heads = {depth: (heads or {}).get(depth, model.lm_head) for depth in depths}
        self.blocks = {depth: block for depth, block in (blocks or {}).items() if depth in depths}
        for module in (model, *self.blocks.values()):
            module.requires_grad_(False).eval()

    @property
    def num_layers(self) -> int:
        """Returns the number of layers of the full model, which is the depth of the last exit."""
        return self.model.config.num_hidden_layers

    @property
    def max_positions(self) -> int:
        """Returns the longest sequence that the model's config allows."""
        return self.model.config.max_position_embeddings

    def hidden_states(self, input_ids_bs: Tensor, attention_mask: Tensor | dict[str, Tensor] | None = None,
                      position_ids_bs: Tensor | None = None) -> dict[int, Tensor]:
        """Returns {depth: hidden_bsh} before the exit's norm, after its block where it has one, of one forward pass.

        Taken by hooks: the last of transformers' own ``hidden_states`` has already been through the final norm. A block gets the mask and
        positions that the layer before it got.

        Args:
            input_ids_bs: Tokens.
            attention_mask: As the model takes it: [b, s] where some tokens only fill up, [b, 1, s, s], or one of these by kind of layer.
            position_ids_bs: Positions; None: from 0.
        """
        found: dict[int, Tensor] = {}

        def keep(depth: int):
            def hook(module, inputs, more, output):
                hidden_bsh = output[0] if isinstance(output, tuple) else output
                if depth in self.blocks:
                    hidden_bsh = self.blocks[depth](hidden_bsh, *inputs[1:], **{**more, "past_key_values": None})
                found[depth] = hidden_bsh
            return hook

        hooks = [self.model.model.layers[depth - 1].register_forward_hook(keep(depth), with_kwargs=True) for depth in self.depths]
        try:
            self.model.model(input_ids=input_ids_bs, attention_mask=attention_mask, position_ids=position_ids_bs, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def logits(self, depth: int, hidden_nh: Tensor) -> Tensor:
        """Returns logits_nv of an exit for any number of hidden states."""
        return self.heads[depth](self.norms[depth](hidden_nh))

    def sub_model(self, depth: int) -> nn.Module:
        """Returns a transformers model of the first ``depth`` layers and the exit's own that shares all parameters; it decodes greedily."""
        sub = shallow_model(self.model, depth, Exit(self.norms[depth], self.heads[depth], self.blocks.get(depth)))
        sub.generation_config = greedy(self.model)
        return sub

    def without_parts(self) -> "NestedModel":
        """Returns the same layers and depths, every exit read by the last one's norm and head."""
        return NestedModel(self.name, self.model, self.depths)


def load_nested_model(directory: Path, depths: Sequence[int] | None = None, dtype: torch.dtype = torch.float32,
                      name: str | None = None) -> NestedModel:
    """Returns the model of a Hugging Face directory with its exits; nothing in the directory is executed.

    Raises:
        CheckpointError: Files are missing or damaged, or tensors are missing or have another shape than config.json says.
        SettingsError: A depth is no exit of the model.
    """
    plan = plan_exits(directory, depths)
    model, exits = load_with_exits(directory, dtype)
    own = {depth: found for depth, found in exits.items() if depth in plan.depths}
    return NestedModel(name or directory.resolve().name, model, plan.depths, {depth: found.norm for depth, found in own.items()},
                       {depth: found.head for depth, found in own.items()},
                       {depth: found.block for depth, found in own.items() if found.block is not None})


def copy_exit(module: nn.Module, weight: Tensor | None = None) -> nn.Module:
    """Returns a norm or head like ``module`` with a weight of its own: ``weight``, or a copy of the module's."""
    own = copy.copy(module)
    own._parameters = dict(module._parameters)
    own.weight = nn.Parameter((module.weight.detach().clone() if weight is None else weight).to(module.weight), requires_grad=False)
    return own
