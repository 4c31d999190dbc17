"""A transformers model with its exits, evaluated in one forward pass, and its sub-models."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_sorted.conversion.hugging_face.families import attention_window
from megatron_sorted.conversion.hugging_face.nested_exits import NestedExit, greedy, shallow_model
from megatron_sorted.exported.exit_plan import plan_exits
from megatron_sorted.exported.load import load_with_exits


class NestedModel:
    """A causal language model of transformers and its exits.

    Attributes:
        name: Name in tables and pictures.
        model: The full model.
        depths: Depths of its exits, increasing; the last is the full model.
        exits: Modules that read the hidden state at each exit, by depth; they may be shared.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        depths: Sequence[int],
        own: Mapping[int, NestedExit] | None = None,
    ):
        """Join a model with its exits.

        Args:
            name: Name in tables and pictures.
            model: The transformers model.
            depths: Depths of the exits.
            own: Exits with their own modules, by depth; the others use the last exit's.
        """
        self.name, self.model, self.depths = name, model, tuple(depths)
        shared = NestedExit(model.model.norm, model.lm_head)
        self.exits = {depth: (own or {}).get(depth, shared) for depth in depths}
        blocks = (one.block for one in self.exits.values() if one.block is not None)
        for module in (model, *blocks):
            module.requires_grad_(False).eval()

    @property
    def num_layers(self) -> int:
        """Return the number of layers of the full model, the depth of the last exit."""
        return self.model.config.num_hidden_layers

    @property
    def max_positions(self) -> int:
        """Return the longest sequence that the model's config allows."""
        return self.model.config.max_position_embeddings

    def hidden_states(
        self,
        input_ids_bs: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids_bs: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """Run one forward pass; return {depth: hidden_bsh} before the exit's norm, after its block.

        Hooks collect them, since the last of transformers' ``hidden_states`` is already normed. A
        block gets the mask and positions of the layer before it.

        Args:
            input_ids_bs: The tokens.
            attention_mask: Mask as the model takes it: [b, s] for padding, [b, 1, s, s], or one of
                these for each kind of layer; None for causal attention.
            position_ids_bs: Positions; None to count from 0.
        """
        hidden: dict[int, Tensor] = {}

        def keep(depth: int):
            def hook(module, inputs, more, output):
                hidden_bsh = output[0] if isinstance(output, tuple) else output
                if (block := self.exits[depth].block) is not None:
                    hidden_bsh = block(hidden_bsh, *inputs[1:], **{**more, "past_key_values": None})
                hidden[depth] = hidden_bsh

            return hook

        hooks = [
            self.model.model.layers[depth - 1].register_forward_hook(keep(depth), with_kwargs=True)
            for depth in self.depths
        ]
        try:
            self.model.model(
                input_ids=input_ids_bs,
                attention_mask=attention_mask,
                position_ids=position_ids_bs,
                use_cache=False,
            )
        finally:
            for hook in hooks:
                hook.remove()
        return hidden

    def logits(self, depth: int, hidden_nh: Tensor) -> Tensor:
        """Return the logits_nv of an exit for hidden states."""
        return self.exits[depth].head(self.exits[depth].norm(hidden_nh))

    def sub_model(self, depth: int) -> nn.Module:
        """Return the sub-model as a transformers model that shares all parameters; it is greedy."""
        sub = shallow_model(self.model, depth, self.exits[depth])
        sub.generation_config = greedy(self.model)
        return sub

    def without_parts(self) -> "NestedModel":
        """Return the same layers and depths, with the last norm and head at every exit."""
        return NestedModel(self.name, self.model, self.depths)


def load_nested_model(
    directory: Path,
    depths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
) -> NestedModel:
    """Load a model with its exits; no code in the directory is executed.

    Args:
        directory: Directory of Hugging Face files.
        depths: Exits to use; None for those that the directory names.
        dtype: Data type of the weights.
        name: Name of the model; None for that of the directory.

    Raises:
        CheckpointError: Files or tensors are missing, damaged, or do not match config.json.
        SettingsError: A depth is no exit of the model.
    """
    plan = plan_exits(directory, depths)
    model, exits = load_with_exits(directory, dtype)
    return NestedModel(name or directory.resolve().name, model, plan.depths, exits)


def copy_exit(original: NestedExit) -> NestedExit:
    """Return an exit with copies of another's norm and head, and without its block."""
    return NestedExit(_copy(original.norm), _copy(original.head))


def _copy(module: nn.Module) -> nn.Module:
    own = copy.copy(module)
    own._parameters = dict(module._parameters)
    own.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    return own


def count_parameters(sub_model: nn.Module) -> int:
    """Return the number of parameters; a matrix that is both embedding and head counts once."""
    return sum(parameter.numel() for parameter in sub_model.parameters())


def forward_flops_per_token(sub_model: nn.Module, seq_length: int) -> int:
    """Return the operations of a forward pass for one token; a multiply-add counts 2.

    They are twice the weights of every linear layer and of the head, and for attention 2 x 2 x
    (mean number of tokens attended to) x (width of all query heads), for scores and values. The
    mean is half the sequence, as in ``settings.costs``, less if a layer has a shorter window.
    """
    config = sub_model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    linear = sum(
        module.in_features * module.out_features
        for module in sub_model.modules()
        if isinstance(module, nn.Linear)
    )
    attended = sum(
        seq_length / 2
        if window is None or window >= seq_length
        else window - window * window / (2 * seq_length)
        for window in (attention_window(config, layer) for layer in range(config.num_hidden_layers))
    )
    return round(2 * linear + 4 * attended * config.num_attention_heads * head_dim)
