"""A model with transformers, its exits in one forward pass, and every sub-model as a transformers model."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_sorted.conversion.hugging_face.nested_exits import Exit, greedy, shallow_model
from megatron_sorted.exported.load import load_with_exits
from megatron_sorted.exported.model_directory import plan_exits


class NestedModel:
    """A causal language model of transformers and its exits.

    Attributes:
        name: What tables and pictures call it.
        model: The full model.
        depths: Its exits, increasing; the last is the full model.
        exits: What reads the hidden state at each; the model's own modules where they are shared.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        depths: Sequence[int],
        own: Mapping[int, Exit] | None = None,
    ):
        """Join a model with its exits.

        Args:
            name: Of the model.
            model: Of transformers.
            depths: Of the exits.
            own: Exits with modules of their own; the others are read by the last one's.
        """
        self.name, self.model, self.depths = name, model, tuple(depths)
        shared = Exit(model.model.norm, model.lm_head)
        self.exits = {depth: (own or {}).get(depth, shared) for depth in depths}
        blocks = (found.block for found in self.exits.values() if found.block is not None)
        for module in (model, *blocks):
            module.requires_grad_(False).eval()

    @property
    def num_layers(self) -> int:
        """Return the number of layers of the full model, which is the depth of the last exit."""
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
        """Return {depth: hidden_bsh} before the exit's norm, after its block where it has one, of one forward pass.

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
                if (block := self.exits[depth].block) is not None:
                    hidden_bsh = block(hidden_bsh, *inputs[1:], **{**more, "past_key_values": None})
                found[depth] = hidden_bsh

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
        return found

    def logits(self, depth: int, hidden_nh: Tensor) -> Tensor:
        """Return logits_nv of an exit for any number of hidden states."""
        return self.exits[depth].head(self.exits[depth].norm(hidden_nh))

    def sub_model(self, depth: int) -> nn.Module:
        """Return a transformers model of the first ``depth`` layers and the exit's own that shares all parameters; it decodes greedily."""
        sub = shallow_model(self.model, depth, self.exits[depth])
        sub.generation_config = greedy(self.model)
        return sub

    def without_parts(self) -> "NestedModel":
        """Return the same layers and depths, every exit read by the last one's norm and head."""
        return NestedModel(self.name, self.model, self.depths)


def load_nested_model(
    directory: Path,
    depths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
) -> NestedModel:
    """Return the model of a Hugging Face directory with its exits; nothing in the directory is executed.

    Raises:
        CheckpointError: Files are missing or damaged, or tensors are missing or have another shape than config.json says.
        SettingsError: A depth is no exit of the model.
    """
    plan = plan_exits(directory, depths)
    model, exits = load_with_exits(directory, dtype)
    return NestedModel(name or directory.resolve().name, model, plan.depths, exits)


def copy_exit(found: Exit) -> Exit:
    """Return an exit whose norm and head have weights of their own, copies of another's; without its block."""
    return Exit(_copy(found.norm), _copy(found.head))


def _copy(module: nn.Module) -> nn.Module:
    own = copy.copy(module)
    own._parameters = dict(module._parameters)
    own.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    return own


def count_parameters(sub_model: nn.Module) -> int:
    """Return the number of different parameters: a matrix used as embedding and as head counts once."""
    return sum(
        parameter.numel()
        for parameter in {id(parameter): parameter for parameter in sub_model.parameters()}.values()
    )


def forward_flops_per_token(sub_model: nn.Module, seq_length: int) -> int:
    """Return operations of a forward pass for one token, a multiply-add counting 2.

    Twice the weights of every linear layer and of the head, and for attention 2 x 2 x (mean tokens attended to) x (width of all query
    heads): scores and values, with a mean of half the sequence, as ``settings.costs``; less where a layer's window is shorter.
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
        for window in _windows(config)
    )
    return round(2 * linear + 4 * attended * config.num_attention_heads * head_dim)


def _windows(config) -> list[int | None]:
    """Return how far every layer looks back; None: without limit."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
