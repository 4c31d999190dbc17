"""A checkpoint with low-rank adapters, read as the ordinary model it computes: W + (alpha / b) B A of the first b ranks."""

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
    """The adapters of a checkpoint: which matrices have one, and how many of its ranks are used."""

    targets: tuple[str, ...]
    alpha: float
    rank_used: int


class MergedLora(TensorSource):
    """The tensors of another source without its adapters, these being added to the matrices they are on.

    Products and sums are made in fp32 a block of rows at a time and rounded once, to the kind of numbers the matrix is stored in. Every
    read gives the same bits.
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
        """Return A [b, in] and B [out, b] of the ranks used of the matrix called ``name``, in fp32."""
        target, b = name.removesuffix("weight"), self.adapters.rank_used
        a_rc, b_or = (
            self.source.read(f"{target}lora_a")[:b],
            self.source.read(f"{target}lora_b")[:, :b],
        )
        # copies, so that both begin where a library's kernels are fastest, whatever lay before them in the file
        return a_rc.to(torch.float32, copy=True), b_or.to(torch.float32, copy=True).contiguous()

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, its adapter merged."""
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
    """Return source and settings of the ordinary model that a checkpoint with adapters is; others as they are.

    Args:
        source: The checkpoint's tensors.
        settings: It was saved with.
        rank_used: How many ranks of every adapter count, 0 for the network without; by default all.
        where: The checkpoint, for messages.

    Raises:
        CheckpointError: It was not trained to be used at that rank, or its tensors are not those that the settings describe.
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
            f"--lora-rank-used: {used}, but the adapters of {where} were trained to work at {what}. Use one of "
            f"{', '.join(map(str, (0, *ranks)))} (0: the network without them)."
        )
    _check_adapters(source, settings, where)
    plain = {
        field.name: field.default
        for field in dataclasses.fields(Settings)
        if field.name in MUST_AGREE or field.name.startswith(("lora_", "dylora"))
    }
    return MergedLora(
        source, AdapterOf(settings.lora_targets, settings.lora_alpha, used)
    ), dataclasses.replace(settings, **plain)


def _check_adapters(source: TensorSource, settings: Settings, where: str) -> None:
    """Check that a checkpoint holds the adapters that its settings describe, each exactly once.

    Raises:
        CheckpointError: Naming one that is missing, unknown, or of another shape.
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
    found = {name: info.shape for name, info in source.tensors.items() if is_adapter(name)}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"{where}: {name} has shape {list(found.get(name) or ()) or 'none, for it is missing'}, and its settings "
                f"make it {list(wanted.get(name) or ()) or 'unknown'}."
            )
