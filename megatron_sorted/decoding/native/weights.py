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
from megatron_sorted.decoding.native.arena import Arena
from megatron_sorted.decoding.native.library import (
    BFLOAT16,
    FLOAT32,
    KINDS,
    CLayer,
    CMatrix,
    CPart,
    CReadout,
)


@dataclass(frozen=True)
class NativeLayer:
    """A packed layer.

    Attributes:
        packed: The library's structure.
    """

    packed: CLayer

    @property
    def num_groups(self) -> int:
        """Return the number of heads of keys and values."""
        return self.packed.groups

    @property
    def head_size(self) -> int:
        """Return the size of a head."""
        return self.packed.head_size


@dataclass(frozen=True)
class NativeReadout:
    """A packed readout of an exit.

    Attributes:
        packed: The library's structure.
        vocab_size: Number of logits: more than the head has are -inf, fewer are the first ones.
        block: The exit's own layer; None without one.
        adapter: The parts before the block; None without a block.
    """

    packed: CReadout
    vocab_size: int
    block: NativeLayer | None = None
    adapter: list[CPart] | None = None


@dataclass
class Packer:
    """Packs the parts of a network that `parts.check_parts` has accepted.

    Attributes:
        library: The compiled library.
        kind: Name of the kind of weights, one of ``KINDS``.
        threads: Number of threads.
        free: Whether to free each matrix once it is packed.
        held: Tensors whose memory the structures point to.
        arena: Memory of the packed matrices.
    """

    library: ctypes.CDLL
    kind: str
    threads: int
    free: bool = True
    held: list[Tensor] = field(default_factory=list)
    arena: Arena = field(default_factory=Arena)
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
        packed = self.arena.empty(self.library.native_packed_bytes(kind, *shape))
        num_scales = self.library.native_num_scales(kind, *shape)
        scales = self.arena.empty(4 * num_scales).view(torch.float32)
        self.library.native_pack(
            self.threads, kind, weight.data_ptr(), *shape, packed.data_ptr(), scales.data_ptr()
        )
        self.held += [packed, scales]
        return packed, scales

    def layer(self, module: nn.Module, window: int | None) -> NativeLayer:
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
        packed = CLayer(
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
            FLOAT32 if self.kind == "float32" else BFLOAT16,
        )
        return NativeLayer(packed)

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

    def readout(self, own: NestedExit, depth: int, config) -> NativeReadout:
        """Pack the readout of the exit at ``depth``."""
        before, norm = [], own.norm
        if isinstance(norm, ExitNorm):
            before, norm = [self.part(part) for part in norm.parts], norm.norm
        packed = CReadout(
            self.matrix(own.head),
            (CPart * len(before))(*before),
            self.hold(norm.weight),
            norm.variance_epsilon,
            len(before),
            config.hidden_size,
        )
        if own.block is None:
            return NativeReadout(packed, packed.head.outputs)
        module, adapter = parts_of_block(own.block)
        layer = self.layer(module, window_of_block(config, depth))
        parts = [] if adapter is None else [self.part(adapter)]
        return NativeReadout(packed, packed.head.outputs, layer, parts)
