"""What reads the hidden state of an exit inside vLLM: the target's norm and head, or its own."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import silu
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead


class NormAfterParts(nn.Module):
    """A norm with an exit's adapter and MLP before it; it takes the place of vLLM's norms.

    Every rank computes them whole.

    Args:
        norm: The norm.
        parts: The exit's tensors (``adapter.*``, ``mlp.*``); others are ignored.
    """

    def __init__(self, norm: RMSNorm, parts: Mapping[str, Tensor]):
        super().__init__()
        self.norm, own = norm, {name: tensor.to(norm.weight) for name, tensor in parts.items()}
        self.adapter = [
            own[f"adapter.{name}.weight"] for name in ("down", "up") if "adapter.up.weight" in own
        ]
        self.mlp = None
        if "mlp.norm.weight" in own:
            self.mlp_norm = norm_like(norm, own["mlp.norm.weight"])
            self.mlp = [own[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]

    def forward(self, hidden: Tensor, residual: Tensor | None = None):
        """Return the normed states [n, h], and the states before the norm if ``residual`` is given.

        The states are the sum of both arguments.
        """
        states = hidden if residual is None else hidden + residual
        if self.adapter:
            down, up = self.adapter
            states = states + states @ down.T @ up.T
        if self.mlp:
            gate, up, down = self.mlp
            normed = self.mlp_norm(states)
            states = states + (silu(normed @ gate.T) * (normed @ up.T)) @ down.T
        normed = self.norm(states)
        return normed if residual is None else (normed, states)


@dataclass
class Readout:
    """The modules that read the hidden state at an exit.

    Attributes:
        target: The target model, whose head is used unless the exit has one.
        norm: The norm, with the exit's parts before it.
        head: The exit's own output matrix, if any.
    """

    target: nn.Module
    norm: nn.Module
    head: nn.Module | None = None

    def logits(self, normed: Tensor) -> Tensor:
        """Return the logits [n, v] of normed states [n, h]. Collective: tensor parallel."""
        if self.head is None:
            return self.target.compute_logits(normed)
        return self.target.logits_processor(self.head, normed)


def readout_of(target: nn.Module, parts: Mapping[str, Tensor], config: VllmConfig) -> Readout:
    """Return what reads an exit of a loaded target.

    Args:
        target: The target.
        parts: The exit's own tensors; {} if it shares the target's norm and head.
        config: vLLM's configuration.
    """
    norm, head = target.model.norm, None
    with set_current_vllm_config(config), norm.weight.device:
        if "norm.weight" in parts:
            norm = norm_like(norm, parts["norm.weight"])
        if any(name.startswith(("adapter.", "mlp.")) for name in parts):
            norm = NormAfterParts(norm, parts)
        if "lm_head.weight" in parts:
            head = _head(target, parts["lm_head.weight"])
    return Readout(target, norm, head)


def norm_like(norm: RMSNorm, weight: Tensor) -> RMSNorm:
    """Return a norm with another weight [h]."""
    own = RMSNorm(norm.hidden_size, norm.variance_epsilon, dtype=norm.weight.dtype)
    own.weight.data.copy_(weight)
    return own.requires_grad_(False)


def _head(target: nn.Module, weight: Tensor) -> ParallelLMHead:
    """Return an output matrix, of which every rank holds its rows."""
    rows, size = weight.shape
    dtype = target.model.norm.weight.dtype
    head = ParallelLMHead(rows, size, params_dtype=dtype)
    head.weight_loader(head.weight, weight.to(dtype))
    head.quant_method.process_weights_after_loading(head)
    return head
