"""Tiny random models whose exits have parts of their own, as directories and as references."""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tests.support.hugging_face import global_weights
from tests.support.model_directories import save_model

OWN_EXITS = (1, 3)
RANK = 3
# Name -> whether an exit has an adapter, a block, an MLP before its norm.
KINDS = {
    "block": (False, True, False),
    "mlp": (False, False, True),
    "adapter": (True, False, False),
    "adapter and block": (True, True, False),
    "adapter and mlp": (True, False, True),
}


@dataclass
class Owned:
    """The parts of one exit: modules of transformers and plain tensors."""

    block: torch.nn.Module | None = None
    mlp: torch.nn.Module | None = None
    mlp_norm: torch.Tensor | None = None
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    head: torch.Tensor | None = None


@dataclass
class NestedCase:
    """A full model of transformers and the parts of its exits."""

    model: torch.nn.Module
    exits: dict[int, Owned] = field(default_factory=dict)

    def their_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of exits.safetensors."""
        tensors_of = {}
        for depth, own in self.exits.items():
            modules = {"block": own.block, "mlp": own.mlp}
            tensors = {
                f"{kind}.{name}": tensor
                for kind, module in modules.items()
                if module is not None
                for name, tensor in module.state_dict().items()
            }
            tensors |= {
                "mlp.norm.weight": own.mlp_norm,
                "adapter.down.weight": own.down,
                "adapter.up.weight": own.up,
                "norm.weight": own.norm,
                "lm_head.weight": own.head,
            }
            tensors_of |= {
                f"exits.{depth}.{name}": tensor.detach().clone()
                for name, tensor in tensors.items()
                if tensor is not None
            }
        return tensors_of

    def our_tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors by the names of a sharded checkpoint."""
        weights = global_weights(self.model)
        for depth, own in self.exits.items():
            if own.block is not None:
                other, first = copy.deepcopy(self.model), "decoder.layers.0."
                other.model.layers[0] = own.block
                weights |= {
                    name.replace(first, f"exit_blocks.{depth}."): tensor
                    for name, tensor in global_weights(other).items()
                    if name.startswith(first)
                }
            if own.mlp is not None:
                weights |= {
                    f"exit_mlps.{depth}.linear_fc1.layer_norm_weight": own.mlp_norm,
                    f"exit_mlps.{depth}.linear_fc1.weight": torch.cat(
                        (own.mlp.gate_proj.weight, own.mlp.up_proj.weight)
                    ).detach(),
                    f"exit_mlps.{depth}.linear_fc2.weight": own.mlp.down_proj.weight.detach(),
                }
            more = {
                "exit_adapters.{}.down.weight": own.down,
                "exit_adapters.{}.up.weight": own.up,
                "exit_norms.{}.weight": own.norm,
                "exit_output_layers.{}.weight": own.head,
            }
            weights |= {
                name.format(depth): tensor for name, tensor in more.items() if tensor is not None
            }
        return weights

    @torch.no_grad()
    def logits(self, depth: int, tokens_bs: torch.Tensor) -> torch.Tensor:
        """Return the expected logits of the exit at ``depth``.

        They come from transformers' own model with fewer layers and the block as the last one; the
        other parts are computed here.
        """
        model, own = copy.deepcopy(self.model), self.exits.get(depth, Owned())
        layers = list(model.model.layers[:depth])
        model.model.layers = torch.nn.ModuleList(layers)
        norm, model.model.norm = model.model.norm, torch.nn.Identity()
        if own.down is not None:
            layers[-1].register_forward_hook(
                lambda _module, _inputs, hidden: hidden + hidden @ own.down.T @ own.up.T
            )
        if own.block is not None:
            model.model.layers.append(own.block)
        model.config.num_hidden_layers = len(model.model.layers)
        hidden_bsh = model.model(tokens_bs, use_cache=False).last_hidden_state
        if own.mlp is not None:
            normed = rms_norm(hidden_bsh, own.mlp_norm, model.config.rms_norm_eps)
            inner = F.silu(normed @ own.mlp.gate_proj.weight.T) * (
                normed @ own.mlp.up_proj.weight.T
            )
            hidden_bsh = hidden_bsh + inner @ own.mlp.down_proj.weight.T
        weight = norm.weight if own.norm is None else own.norm
        return (
            rms_norm(hidden_bsh, weight, model.config.rms_norm_eps)
            @ (model.lm_head.weight if own.head is None else own.head).T
        )


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return the hidden state over its root mean square, times a weight.

    Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4.
    """
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon) * weight


def _other(module: torch.nn.Module, generator: torch.Generator) -> torch.nn.Module:
    other = copy.deepcopy(module)
    for parameter in other.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return other


def save_nested(
    directory: Path,
    family: str,
    kind: str,
    tied: bool = False,
    norms: bool = False,
    heads: bool = False,
    exits: tuple[int, ...] = OWN_EXITS,
    dtype: torch.dtype = torch.float32,
) -> NestedCase:
    """Write a model of one of ``FAMILIES`` with exits of one of ``KINDS``; return its reference."""
    adapter, block, mlp = KINDS[kind]
    model = save_model(directory, family, tied, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    case, h = NestedCase(model), model.config.hidden_size

    def numbers(*shape: int) -> torch.Tensor:
        return (0.4 * torch.randn(shape, generator=generator)).to(dtype)

    for depth in exits:
        own = Owned()
        if adapter:
            own.down, own.up = numbers(RANK, h), numbers(h, RANK)
        if block:
            own.block = _other(model.model.layers[-1], generator)
            own.block.self_attn.layer_idx = depth
        if mlp:
            own.mlp, own.mlp_norm = _other(model.model.layers[-1].mlp, generator), 1 + numbers(h)
        if norms:
            own.norm = 1 + numbers(h)
        if heads:
            own.head = numbers(model.config.vocab_size, h)
        case.exits[depth] = own
    save_file(case.their_tensors(), directory / "exits.safetensors", {"format": "pt"})
    parts = {"exit_block": block, "exit_mlp": mlp, "exit_adapter_rank": RANK * adapter}
    change_config(
        directory,
        exit_layer_indices=[*exits, 4],
        own_exit_norms=norms,
        tie_exit_lm_head=not heads,
        **{key: value for key, value in parts.items() if value},
    )
    return case


def change_config(directory: Path, **changes) -> None:
    """Write keys of config.json; None removes one."""
    path = directory / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
