"""A checkpoint with low-rank adapters, read as an ordinary model with adapters merged.

A matrix becomes W + (alpha / b) B A, with the first b ranks of A and B.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_sorted.conversion.tensors.source import TensorInfo, TensorSource
from megatron_sorted.errors import CheckpointError
from megatron_sorted.settings.lora import MUST_AGREE, is_adapter, nested_ranks
from megatron_sorted.settings.matrices import layer_shapes
from megatron_sorted.settings.run import Settings

BLOCK_BYTES = 8 << 20
WHERE = {
    "linear_qkv": "self_attention",
    "linear_proj": "self_attention",
    "linear_fc1": "mlp",
    "linear_fc2": "mlp",
}


@dataclass(frozen=True)
class AdapterOf:
    """The adapters of a checkpoint.

    Attributes:
        targets: The matrices that have one.
        alpha: The scale of the products.
        rank_used: The number of ranks that are used.
    """

    targets: tuple[str, ...]
    alpha: float
    rank_used: int


class MergedLora(TensorSource):
    """The tensors of another source, with its adapters added to their matrices.

    Products and sums are computed in fp32, a block of rows at a time, and rounded once to the data
    type of the matrix. Every read gives the same bits.
    """

    def __init__(self, source: TensorSource, adapters: AdapterOf):
        self.source, self.adapters = source, adapters
        self.tensors: Mapping[str, TensorInfo] = {
            name: info for name, info in source.tensors.items() if not is_adapter(name)
        }

    def is_adapted(self, name: str) -> bool:
        """Return whether an adapter is added to the matrix called ``name``."""
        target = name.removesuffix("weight")
        return (
            name.endswith(".weight")
            and f"{target}lora_a" in self.source.tensors
            and self.adapters.rank_used > 0
        )

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Read A [b, in] and B [out, b] of a matrix in fp32, restricted to the used ranks."""
        target, b = name.removesuffix("weight"), self.adapters.rank_used
        a_rc, b_or = (
            self.source.read(f"{target}lora_a")[:b],
            self.source.read(f"{target}lora_b")[:, :b],
        )
        # Copies begin at addresses where kernels are fastest, whatever their offsets in the file.
        return a_rc.to(torch.float32, copy=True), b_or.to(torch.float32, copy=True).contiguous()

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor and merge its adapter."""
        tensor = self.source.read(name)
        if not self.is_adapted(name):
            return tensor
        a_rc, b_or = self.pair(name)
        scale, rows = (
            self.adapters.alpha / self.adapters.rank_used,
            max(1, BLOCK_BYTES // (4 * tensor.shape[1])),
        )
        for first in range(0, tensor.shape[0], rows):
            block = tensor[first : first + rows]
            block.copy_(
                block.to(torch.float32, copy=True).addmm_(
                    b_or[first : first + rows], a_rc, alpha=scale
                )
            )
        return tensor


def merge_adapters(
    source: TensorSource, settings: Settings, rank_used: int | None, where: str
) -> tuple[TensorSource, Settings]:
    """Return source and settings of a model with its adapters merged.

    Without adapters they are returned unchanged.

    Args:
        source: The checkpoint's tensors.
        settings: The settings it was saved with.
        rank_used: The number of ranks to use of every adapter; 0 for none, by default all.
        where: The name of the checkpoint, for messages.

    Raises:
        CheckpointError: The adapters were not trained for that rank, or the tensors are not those
            that the settings describe.
    """
    if not settings.lora_rank:
        return source, settings
    used, ranks = settings.lora_rank if rank_used is None else rank_used, nested_ranks(settings)
    if used not in (0, *ranks):
        what = (
            f"the ranks {', '.join(map(str, ranks))}"
            if settings.dylora
            else f"all {settings.lora_rank} ranks together (no --dylora)"
        )
        raise CheckpointError(
            f"--lora-rank-used: {used}, but the adapters of {where} were trained to work at "
            f"{what}. Use one of {', '.join(map(str, (0, *ranks)))} (0: the network without them)."
        )
    _check_adapters(source, settings, where)
    without_adapters = {
        field.name: field.default
        for field in dataclasses.fields(Settings)
        if field.name in MUST_AGREE or field.name.startswith(("lora_", "dylora"))
    }
    return MergedLora(
        source, AdapterOf(settings.lora_targets, settings.lora_alpha, used)
    ), dataclasses.replace(settings, **without_adapters)


def _check_adapters(source: TensorSource, settings: Settings, where: str) -> None:
    """Check that a checkpoint holds the adapters that its settings describe, each exactly once.

    Raises:
        CheckpointError: An adapter is missing, unknown, or of another shape.
    """
    wanted = {}
    for target in settings.lora_targets:
        rows, columns = layer_shapes(settings).matrices[target]
        for layer in range(settings.num_layers):
            name = f"decoder.layers.{layer}.{WHERE[target]}.{target}"
            wanted |= {
                f"{name}.lora_a": (settings.lora_rank, columns),
                f"{name}.lora_b": (rows, settings.lora_rank),
            }
    stored = {name: info.shape for name, info in source.tensors.items() if is_adapter(name)}
    for name in sorted(wanted.keys() | stored.keys()):
        if wanted.get(name) != stored.get(name):
            raise CheckpointError(
                f"{where}: {name} has shape "
                f"{list(stored.get(name) or ()) or 'none, for it is missing'}, and its settings "
                f"make it {list(wanted.get(name) or ()) or 'unknown'}."
            )
