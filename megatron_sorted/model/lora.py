"""Low-rank adapters on linear layers of a transformer: y = W x + (alpha / r) B A x, W frozen.

Shapes: A [r, in], B [out, r]. In a column-parallel layer B is sharded by rows as W is, and every
rank holds a copy of A; in a row-parallel layer A is sharded by columns as W is, and every rank
holds a copy of B. Only x A^T, r numbers a token, is communicated.

Source: LoRA (Hu et al., arXiv 2106.09685, section 4.1); nested ranks: DyLoRA (Valipour et al.,
    arXiv 2210.07558, section 4).
"""

import copy
import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_sorted.exits.chance import hashed_number
from megatron_sorted.platform.state import current_device, random_tracker
from megatron_sorted.platform.versions import known_arguments, mlp_parts, with_options
from megatron_sorted.settings.run import Settings


@dataclass
class RanksInUse:
    """Number of ranks of every adapter that training steps use; adapters of a chunk share it."""

    count: int


@dataclass(frozen=True)
class Adapter:
    """Properties common to all adapters of a run.

    Attributes:
        rank: Rank of the product B A.
        alpha: Scale: the product of the first b ranks is multiplied by alpha / b.
        dropout: Dropout on the adapter's input.
        only_last: Whether only the last of the ranks in use receives a gradient.
        in_use: Number of ranks in use in training; evaluation uses all.
    """

    rank: int
    alpha: float
    dropout: float
    only_last: bool
    in_use: RanksInUse


class _Adapted:
    """The pair of matrices A and B beside a linear layer of Megatron's."""

    adapter: Adapter

    def _add_pair(self, adapter: Adapter, num_inputs: int, num_outputs: int) -> None:
        """Allocate the two matrices; ``start_adapters`` initialises them."""
        self.adapter = adapter
        options = {"dtype": self.config.params_dtype, "device": current_device()}
        self.lora_a = torch.nn.Parameter(torch.zeros(adapter.rank, num_inputs, **options))
        self.lora_b = torch.nn.Parameter(torch.zeros(num_outputs, adapter.rank, **options))
        for parameter in (self.lora_a, self.lora_b):
            parameter.allreduce = True  # over all data parallel ranks, unlike an expert's parameter

    def _pair(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return A and B of the ranks in use, and the scale of their product.

        Source: ``DyLoRA/loralib/DyLoRA.py`` of huawei-noah/Efficient-NLP multiplies alpha / r by
            sqrt(r / b) for each of the two matrices where b ranks are in use: alpha / b. Its
            "frozen" form detaches the ranks below the last.
        """
        a_rc, b_or, adapter = self.lora_a, self.lora_b, self.adapter
        count = adapter.in_use.count if self.training else adapter.rank
        if count < adapter.rank:
            a_rc, b_or = a_rc[:count], b_or[:, :count]
        if self.training and adapter.only_last and count > 1:
            a_rc = torch.cat((a_rc[:-1].detach(), a_rc[-1:]))
            b_or = torch.cat((b_or[:, :-1].detach(), b_or[:, -1:]), 1)
        return a_rc, b_or, adapter.alpha / count

    def _drop(self, hidden: torch.Tensor, is_sharded: bool) -> torch.Tensor:
        """Apply dropout to the adapter's input.

        Tensor parallel ranks use the same random numbers where they hold the same tensor, different
        ones where each holds a shard.
        """
        if not self.training or self.adapter.dropout == 0.0:
            return hidden
        with random_tracker().fork() if is_sharded else nullcontext():
            return F.dropout(hidden, self.adapter.dropout)

    @staticmethod
    def _add_product(
        output: torch.Tensor, z_tbr: torch.Tensor, b_or: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Return ``output + scale * z B^T`` without a temporary of the output's size."""
        return torch.addmm(output.flatten(0, -2), z_tbr.flatten(0, -2), b_or.t(), alpha=scale).view(
            output.shape
        )

    def start_pair(self, key: str) -> None:
        """Initialise A with random values, alike in every layout, and B with zeros.

        So at first the network's output equals that without adapters.

        Source: ``loralib`` of LoRA and ``peft`` draw A by kaiming_uniform(a = sqrt(5)), that is
            uniformly from +-1 / sqrt(in).

        Args:
            key: Text that the values depend on: seed, layer and target.
        """
        # torch's seeds are below 2^63
        generator = torch.Generator().manual_seed(hashed_number(f"adapter {key}") >> 1)
        whole_rc = torch.empty(self.adapter.rank, self.input_size)
        torch.nn.init.kaiming_uniform_(whole_rc, a=math.sqrt(5), generator=generator)
        columns = self.lora_a.shape[1]
        first = self.tp_group.rank() * columns if columns < self.input_size else 0
        with torch.no_grad():
            self.lora_a.copy_(whole_rc[:, first : first + columns])
            self.lora_b.zero_()


class AdaptedColumnParallelLinear(_Adapted, ColumnParallelLinear):
    """Megatron's column-parallel layer with an adapter.

    Under sequence parallelism a rank computes x A^T of its own tokens only, so the gradient of A is
    a sum over ranks: A is marked, and Megatron's gradient finalisation sums its gradient.
    """

    def __init__(
        self, *arguments, adapter: Adapter, is_gated: bool = False, stride: int = 1, **options
    ):
        super().__init__(*arguments, stride=stride, **options)
        # then every rank holds a shard of the gate, followed by one of the up projection
        # (megatron.core.transformer.mlp)
        self.is_gated = is_gated
        self._add_pair(adapter, self.input_size, self.output_size_per_partition)
        set_tensor_model_parallel_attributes(self.lora_b, True, 0, stride)
        self.lora_a.sequence_parallel = self.sequence_parallel

    def forward(
        self, input_: torch.Tensor, *arguments, **options
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return output and bias as Megatron's layer does.

        Collective: over the tensor parallel group: Megatron's; and for x A^T, under sequence
            parallelism an all-gather in forward and a reduce-scatter in backward, otherwise one
            all-reduce in backward.
        """
        output, bias = super().forward(input_, *arguments, **options)
        a_rc, b_or, scale = self._pair()
        z_tbr = F.linear(self._drop(input_, self.sequence_parallel), a_rc)
        if self.sequence_parallel:
            z_tbr = gather_from_sequence_parallel_region(
                z_tbr, tensor_parallel_output_grad=True, group=self.tp_group
            )
        else:
            z_tbr = copy_to_tensor_model_parallel_region(z_tbr, group=self.tp_group)
        return self._add_product(output, z_tbr, b_or, scale), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """Return Megatron's sharded state dict, with B sharded as the weight is."""
        sharded_axes = {"weight": 0, "bias": 0, "lora_b": 0}
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            sharded_axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.is_gated:  # Megatron's MLP does this for the names weight and bias only
            name = f"{prefix}lora_b"
            state[name] = apply_swiglu_sharded_factory(
                state[name],
                sharded_offsets,
                metadata.get("singleton_local_shards", False),
                **known_arguments(
                    apply_swiglu_sharded_factory,
                    tp_group=self.tp_group,
                    dp_group=metadata["dp_cp_group"],
                ),
            )
        return state


class AdaptedRowParallelLinear(_Adapted, RowParallelLinear):
    """Megatron's row-parallel layer with an adapter.

    Under sequence parallelism a rank computes B (A x) of its own tokens only, so the gradient of B
    is a sum over ranks: B is marked.
    """

    def __init__(self, *arguments, adapter: Adapter, **options):
        super().__init__(*arguments, **options)
        self._add_pair(adapter, self.input_size_per_partition, self.output_size)
        set_tensor_model_parallel_attributes(self.lora_a, True, 1, 1)
        self.lora_b.sequence_parallel = self.sequence_parallel

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return output and bias as Megatron's layer does.

        Collective: over the tensor parallel group: Megatron's; and for x A^T, under sequence
            parallelism a reduce-scatter in forward and an all-gather in backward, otherwise one
            all-reduce in forward.
        """
        output, bias = super().forward(input_)
        a_rc, b_or, scale = self._pair()
        z_tbr = F.linear(self._drop(input_, self.tp_group.size() > 1), a_rc)
        if self.sequence_parallel:
            z_tbr = reduce_scatter_to_sequence_parallel_region(z_tbr, group=self.tp_group)
        else:
            z_tbr = reduce_from_tensor_model_parallel_region(z_tbr, group=self.tp_group)
        return self._add_product(output, z_tbr, b_or, scale), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """Return Megatron's sharded state dict, with A sharded as the weight is."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 1, "lora_a": 1},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def with_adapters(spec: ModuleSpec, settings: Settings, in_use: RanksInUse) -> ModuleSpec:
    """Return a layer's specification with adapters on the targets of ``settings``.

    Where ``settings.lora_rank`` is 0, the specification is returned unchanged.
    """
    if not settings.lora_rank:
        return spec
    adapter = Adapter(
        settings.lora_rank,
        settings.lora_alpha,
        settings.lora_dropout,
        settings.dylora_frozen,
        in_use,
    )
    spec = copy.deepcopy(spec)
    attention, mlp = spec.submodules.self_attention.submodules, mlp_parts(spec)
    holders = {
        "linear_qkv": attention,
        "linear_proj": attention,
        "linear_fc1": mlp,
        "linear_fc2": mlp,
    }
    kinds = {
        ColumnParallelLinear: AdaptedColumnParallelLinear,
        RowParallelLinear: AdaptedRowParallelLinear,
    }
    for target in settings.lora_targets:
        kind = kinds[getattr(holders[target], target)]
        options = {"adapter": adapter}
        if target == "linear_fc1":
            options["is_gated"] = settings.swiglu
        setattr(holders[target], target, with_options(kind, **options))
    return spec


def start_adapters(layers: Iterable[torch.nn.Module], layers_before: int, seed: int) -> None:
    """Initialise all adapters of a chunk's layers.

    The values depend on the seed and the adapters' places in the network alone.

    Args:
        layers: Layers of the chunk.
        layers_before: Number of layers before the chunk.
        seed: The run's seed.
    """
    for index, layer in enumerate(layers, layers_before):
        for name, module in layer.named_modules():
            if isinstance(module, _Adapted):
                module.start_pair(f"{seed}/{index}/{name}")
