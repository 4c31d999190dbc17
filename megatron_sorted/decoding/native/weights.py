"""Matrices and layers packed for the compiled library.

Kinds: float32; bfloat16, products of rounded weights and inputs summed in float32; int8, groups of
64 inputs with a scale each, weights and inputs alike, whose products are exact whole numbers.
"""

import ctypes
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatron_sorted.conversion.hugging_face.nested_exits import ExitAdapter, ExitNorm, NestedExit
from megatron_sorted.decoding.cache.eager import parts_of_block, window_of_block
from megatron_sorted.decoding.native.library import KINDS, CLayer, CMatrix, CPart, CReadout


@dataclass
class Packer:
    """Packs the parts of a network that `parts.check_parts` has accepted.

    Attributes:
        library: The compiled library.
        kind: Name of the kind of weights, one of ``KINDS``.
        threads: Number of threads.
        free: Whether to free each matrix once it is packed.
        held: Tensors whose memory the structures point to.
    """

    library: ctypes.CDLL
    kind: str
    threads: int
    free: bool = True
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
        """
        # addresses of parameters, since those of freed weights are used again
        key = tuple(id(module.weight) for module in modules)
        if key in self._matrices:
            return self._matrices[key]
        weights = [module.weight.detach().to(torch.float32) for module in modules]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        del weights
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
        for module in modules:
            self.release(module.weight)
        return made

    def release(self, parameter: nn.Parameter) -> None:
        """Free a packed matrix."""
        if self.free:
            parameter.data = parameter.data.new_empty(0)

    def return_memory(self) -> None:
        """Give freed memory back to the system where the C library keeps it (glibc)."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if self.free else None
        if trim is not None:
            trim(0)

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
        """Pack a decoder layer of transformers (Llama, Mistral, Qwen2, Qwen3)."""
        attention, mlp = module.self_attn, module.mlp
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
        """Pack an adapter or MLP of an exit's own."""
        if isinstance(module, ExitAdapter):
            return CPart(self.matrix(module.down), self.matrix(module.up), None, 0.0)
        return CPart(
            self.matrix(module.mlp.gate_proj, module.mlp.up_proj),
            self.matrix(module.mlp.down_proj),
            self.hold(module.norm.weight),
            module.norm.variance_epsilon,
        )

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
        module, adapter = parts_of_block(own.block)
        layer = self.layer(module, window_of_block(config, depth))
        return layer, [] if adapter is None else [self.part(adapter)]
