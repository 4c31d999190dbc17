"""Matrices and layers packed for the compiled library.

Kinds: float32; bfloat16, products of rounded weights and inputs summed in float32; int8, groups of
64 inputs with a scale each, weights and inputs alike, whose products are exact whole numbers.
"""

import ctypes
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatron_sorted.conversion.hugging_face.families import attention_window
from megatron_sorted.conversion.hugging_face.nested_exits import (
    ExitAdapter,
    ExitBlock,
    ExitMlp,
    ExitNorm,
    NestedExit,
)
from megatron_sorted.decoding.native.compiler import NativeError
from megatron_sorted.decoding.native.library import KINDS, CLayer, CMatrix, CPart, CReadout


@dataclass
class Packer:
    """Packs the parts of a network, and frees the unpacked weights.

    Attributes:
        library: The compiled library.
        kind: Name of the kind of weights, one of ``KINDS``.
        threads: Number of threads.
        held: Tensors whose memory the structures point to.
    """

    library: ctypes.CDLL
    kind: str
    threads: int
    held: list[Tensor] = field(default_factory=list)
    _matrices: dict[tuple[int, ...], CMatrix] = field(default_factory=dict)

    def hold(self, tensor: Tensor) -> int:
        """Return the address of a copy of ``tensor`` in float32 that stays where it is."""
        kept = tensor.detach().to(torch.float32).contiguous()
        self.held.append(kept)
        return kept.data_ptr()

    def matrix(self, *modules: nn.Linear) -> CMatrix:
        """Pack the matrices of linear modules, one below the other, as one.

        A matrix that several exits share is packed once.

        Raises:
            NativeError: A weight is not finite.
        """
        key = tuple(module.weight.data_ptr() for module in modules)
        if key in self._matrices:
            return self._matrices[key]
        weight = torch.cat([module.weight.detach().to(torch.float32) for module in modules])
        if not torch.isfinite(weight).all():
            raise NativeError("a matrix of the model holds weights that are not finite")
        bias = [module.bias for module in modules]
        packed, scales = self.pack(weight)
        made = CMatrix(
            KINDS[self.kind],
            *weight.shape,
            0,
            packed.data_ptr(),
            scales.data_ptr() or None,
            None if bias[0] is None else self.hold(torch.cat(bias)),
        )
        self._matrices[key] = made
        return made

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Pack a matrix [out, in] of float32; return the packed bytes and the scales of int8."""
        kind, shape = KINDS[self.kind], weight.shape
        weight = weight.contiguous()
        packed = torch.empty(self.library.native_packed_bytes(kind, *shape), dtype=torch.uint8)
        scales = torch.empty(self.library.native_num_scales(kind, *shape), dtype=torch.float32)
        self.library.native_pack(
            self.threads, kind, weight.data_ptr(), *shape, packed.data_ptr(), scales.data_ptr()
        )
        self.held += [packed, scales]
        return packed, scales

    def layer(self, module: nn.Module, window: int | None) -> CLayer:
        """Pack a decoder layer of transformers (Llama, Mistral, Qwen2, Qwen3).

        Raises:
            NativeError: It has a part that the library does not know.
        """
        attention, mlp = module.self_attn, module.mlp
        check_activation(mlp)
        size = attention.head_dim
        heads, groups = (
            projection.out_features // size for projection in (attention.q_proj, attention.k_proj)
        )
        first, second = module.input_layernorm, module.post_attention_layernorm
        qk_norm, qk_epsilon = None, 0.0
        if hasattr(attention, "q_norm"):
            both = [
                attention.q_norm.weight.expand(heads, -1),
                attention.k_norm.weight.expand(groups, -1),
            ]
            qk_norm, qk_epsilon = self.hold(torch.cat(both)), attention.q_norm.variance_epsilon
        return CLayer(
            self.matrix(attention.q_proj, attention.k_proj, attention.v_proj),
            self.matrix(attention.o_proj),
            self.matrix(mlp.gate_proj, mlp.up_proj),
            self.matrix(mlp.down_proj),
            self.hold(first.weight),
            self.hold(second.weight),
            qk_norm,
            first.variance_epsilon,
            second.variance_epsilon,
            qk_epsilon,
            heads,
            groups,
            size,
            window or 0,
        )

    def part(self, module: nn.Module) -> CPart:
        """Pack an adapter or MLP of an exit's own.

        Raises:
            NativeError: It is neither.
        """
        if isinstance(module, ExitAdapter):
            return CPart(self.matrix(module.down), self.matrix(module.up), None, 0.0)
        if isinstance(module, ExitMlp):
            check_activation(module.mlp)
            return CPart(
                self.matrix(module.mlp.gate_proj, module.mlp.up_proj),
                self.matrix(module.mlp.down_proj),
                self.hold(module.norm.weight),
                module.norm.variance_epsilon,
            )
        raise NativeError(f"an exit has a {type(module).__name__}, which the library does not know")

    def readout(self, own: NestedExit, hidden_size: int) -> CReadout:
        """Pack norm and head of an exit, with the parts before the norm."""
        parts, norm = [], own.norm
        if isinstance(norm, ExitNorm):
            parts, norm = [self.part(part) for part in norm.parts], norm.norm
        return CReadout(
            self.matrix(own.head),
            (CPart * len(parts))(*parts),
            self.hold(norm.weight),
            norm.variance_epsilon,
            len(parts),
            hidden_size,
        )

    def block(self, own: NestedExit, depth: int, config) -> tuple[CLayer, list[CPart]] | None:
        """Pack an exit's own layer and the adapter before it; None for an exit without one."""
        if own.block is None:
            return None
        module, adapter = own.block, None
        if isinstance(module, ExitBlock):
            module, adapter = module.layer, module.adapter
        window = attention_window(config, min(depth, config.num_hidden_layers - 1))
        return self.layer(module, window), [] if adapter is None else [self.part(adapter)]


def check_activation(mlp: nn.Module) -> None:
    """Check that an MLP is SwiGLU, the only one that the library knows.

    Raises:
        NativeError: It is another one.
    """
    if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        raise NativeError(
            f"an MLP's activation is {type(mlp.act_fn).__name__}, which the library does not know"
        )
