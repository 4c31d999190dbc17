"""Fully sharded data parallelism: each rank keeps some rows of every parameter.

That includes gradients and optimizer state. torch's FSDP2 (``fully_shard``) gathers a layer when it
runs and reduces its gradients when its backward is done. Exits need more: their loss reads norm and
output matrix in backward, outside any module's forward, and adds gradients to them by itself
(``loss.gradient``). So the chunk calls hooks before an exit is read and after its backward
(``SortedChunk.exit_hooks``), which gather and reduce these parameters. Megatron's optimizer is
given this rank's rows as ordinary parameters, which share their memory with torch's.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import make_viewless_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.supported import TORCH_FOR_FSDP, shown


def check_torch_can_shard() -> None:
    """Check that the installed torch supports this sharding.

    Raises:
        PlatformError: It is too old.
    """
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise PlatformError(
            f"--data-parallel fsdp: torch {torch.__version__} cannot sum gradients without "
            "dividing them (FSDPModule.set_force_sum_reduction_for_comms). "
            f"Install torch {shown(TORCH_FOR_FSDP)} or later, or use --data-parallel ddp."
        )


@dataclass
class RowShard:
    """The rows of one parameter that this rank keeps.

    Rows are divided as ``torch.chunk`` does, so the last ranks may have none.

    Attributes:
        name: Name of the parameter in the chunk.
        sharded: torch's parameter, whose local part these rows are.
        rows: The same memory as an ordinary fp32 parameter, for the optimizer; its ``main_grad`` is
            set once gradients are reduced.
        first_row: Number of the first row in the whole parameter.
        num_ranks: Number of ranks that share the parameter.
        gathered: The whole parameter that exits read; None until one has.
        sum: Sum of the exits' gradients of the whole parameter: fp32, padded to equal shares.
        from_exits: This rank's rows of those gradients, summed over ranks.
    """

    name: str
    sharded: torch.nn.Parameter
    rows: torch.nn.Parameter
    first_row: int
    num_ranks: int
    gathered: torch.nn.Parameter | None = None
    sum: torch.Tensor | None = None
    from_exits: torch.Tensor | None = field(default=None)

    def take_gradients_of(self, gathered: torch.nn.Parameter) -> None:
        """Allocate the sum to which exits add their gradients of the whole parameter, in fp32."""
        if self.sum is None:
            share = -(-gathered.shape[0] // self.num_ranks)
            self.sum = torch.zeros(
                (share * self.num_ranks, *gathered.shape[1:]),
                dtype=torch.float32,
                device=gathered.device,
            )
        self.gathered, gathered.main_grad = gathered, self.sum[: gathered.shape[0]]

    def reduce_exits(self, group: dist.ProcessGroup) -> None:
        """Sum the exits' gradients over all ranks; each rank receives its rows.

        Collective: one reduce-scatter of the parameter's size in fp32 over ``group``, if an exit
            was read since the last one.
        """
        if self.sum is None:
            return
        share = self.sum.shape[0] // self.num_ranks
        own = self.sum.new_empty(share, *self.sum.shape[1:])
        dist.reduce_scatter_tensor(own, self.sum, group=group)
        own = own[: self.rows.shape[0]]
        self.from_exits = own if self.from_exits is None else self.from_exits.add_(own)
        self.gathered.main_grad = self.sum = None

    def finish(self) -> None:
        """Set ``main_grad`` to the sum of the layers' gradients, reduced by torch, and the exits'.

        It is zero where there are neither.
        """
        from_layers = self.sharded.grad.to_local() if self.sharded.grad is not None else None
        self.sharded.grad = None
        parts = [part for part in (from_layers, self.from_exits) if part is not None]
        gradient = parts[0] if parts else torch.zeros_like(self.rows, requires_grad=False)
        self.rows.main_grad = gradient.add_(parts[1]) if len(parts) > 1 else gradient
        self.from_exits = None

    def clear(self) -> None:
        """Forget all gradients."""
        if self.gathered is not None:
            self.gathered.main_grad = None
        self.sharded.grad = self.sum = self.from_exits = self.rows.grad = self.rows.main_grad = None


class FullyShardedChunk(torch.nn.Module):
    """A fully sharded network of one pipeline stage.

    It has the interface of a wrapped model for Megatron's schedules, gradient finalisation and
    optimizers.

    Attributes:
        module: The model chunk with all layers.
        row_shards: This rank's rows of every parameter.
        states: {name: whole tensor or other object}, the chunk's sharded state dict from before it
            was sharded; tensors have no data.
    """

    def __init__(
        self,
        config: TransformerConfig,
        stage: torch.nn.Module,
        group: dist.ProcessGroup,
        device: str,
        dtype: torch.dtype,
        states: dict[str, Any],
    ):
        """Shard ``stage``, whose weights are the same on all ranks.

        Args:
            config: Megatron's configuration.
            stage: A ``SortedChunk`` with all layers.
            group: The data parallel ranks.
            device: Kind of device, by torch's name.
            dtype: Dtype of the parameters in layers and exits; this rank's rows are kept in fp32.
            states: The chunk's sharded state dict, with data.
        """
        super().__init__()
        self.module, self.config, self.group = stage, config, group
        self.ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        # Megatron's gradient buffers, of which there are none here
        self.buffers, self.expert_parallel_buffers = [], []
        self._mean = 1.0 if config.calculate_per_token_loss else 1.0 / group.size()
        self.states = {name: _without_data(state) for name, state in states.items()}
        attributes = {name: dict(vars(parameter)) for name, parameter in stage.named_parameters()}
        mesh = DeviceMesh.from_group(group, device)
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        # the embedding returns a view, and an operation in place on it would lose torch's hook
        stage.embedding.register_forward_hook(
            lambda _module, _args, hidden: make_viewless_tensor(
                inp=hidden, requires_grad=hidden.requires_grad, keep_graph=True
            )
        )
        for unit in (*stage.decoder.layers, stage.embedding, *stage.heads.outputs):
            fully_shard(unit.float(), mesh=mesh, mp_policy=policy)
        # the rest are norms of exits: small, and read in backward, so they stay gathered until then
        fully_shard(stage.float(), mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        for module in stage.modules():
            if isinstance(module, FSDPModule):  # sums only: Megatron's scaling of losses divides
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self.row_shards = [
            self._own_rows(name, parameter, attributes[name])
            for name, parameter in stage.named_parameters()
        ]
        self._by_name = {shard.name: shard for shard in self.row_shards}
        self._names = {module: name for name, module in stage.named_modules()}
        stage.exit_hooks = (self._gather_exit, self._finish_exit)

    def _own_rows(
        self, name: str, sharded: torch.nn.Parameter, attributes: dict[str, Any]
    ) -> RowShard:
        """Return this rank's rows of a parameter, with attributes for Megatron's optimizer."""
        rows = torch.nn.Parameter(sharded.to_local().detach(), requires_grad=sharded.requires_grad)
        for key, value in attributes.items():
            setattr(rows, key, value)
        num_rows, num_ranks = sharded.shape[0], self.group.size()
        share = -(-num_rows // num_ranks)
        return RowShard(name, sharded, rows, min(self.group.rank() * share, num_rows), num_ranks)

    def forward(self, *args, **kwargs) -> torch.Tensor:
        """Return the chunk's output.

        Collective: over the data parallel group: one all-gather of each layer when it runs; in
            evaluation also one of each exit's output matrix.
        """
        output = self.module(*args, **kwargs)
        if not torch.is_grad_enabled():  # backward frees gathered parameters, but there is none
            for module in (self.module, *self.module.heads.outputs):
                module.reshard()
        return output

    def _read_by(self, depth: int) -> tuple[torch.nn.Module, list[RowShard]]:
        """Return the parameters that the exit at ``depth`` reads.

        They are the FSDP module that gathers its output matrix, and this rank's rows of the matrix
        and of the norm.
        """
        modules = self.module.heads.by_depth[depth]
        is_unit = isinstance(modules.output, FSDPModule)
        unit = modules.output if is_unit else self.module.embedding
        norm = self._names[modules.norm]
        return unit, [
            self._by_name[f"{self._names[modules.output]}.weight"],
            *(self._by_name[f"{norm}.{name}"] for name, _ in modules.norm.named_parameters()),
        ]

    def _gather_exit(self, depth: int) -> None:
        """Gather the exit's output matrix, if it is not gathered, and allocate its gradients.

        Collective: one all-gather of the output matrix over the data parallel group, for the first
            exit of a pass that reads it.
        """
        unit, rows = self._read_by(depth)
        unit.unshard()
        if self.training:
            for shard in rows:
                shard.take_gradients_of(self.module.get_parameter(shard.name))

    def _finish_exit(self, depth: int) -> None:
        """Free the exit's own output matrix and its gradient.

        A shared matrix stays until backward ends, the sum of its gradients until the step ends.

        Collective: for an output matrix of the exit's own, one reduce-scatter over the data
            parallel group (``RowShard.reduce_exits``).
        """
        if depth in self.module.layout.exit_heads:
            unit, rows = self._read_by(depth)
            rows[0].reduce_exits(self.group)
            unit.reshard()

    def named_parameters(self, *_args, **_kwargs) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield (name of the parameter, this rank's rows) for every parameter."""
        return ((shard.name, shard.rows) for shard in self.row_shards)

    def zero_grad_buffer(self) -> None:
        """Forget all gradients; called before a step."""
        for shard in self.row_shards:
            shard.clear()

    def finish_grad_sync(self, *_args, **_kwargs) -> None:
        """Complete the gradients of this rank's rows, after all micro-batches.

        Collective: one reduce-scatter for every norm and shared output matrix that exits have read,
            over the data parallel group.
        """
        for shard in self.row_shards:
            shard.reduce_exits(self.group)
            shard.finish()
        if self._mean != 1.0:
            self.scale_gradients(self._mean)

    def scale_gradients(self, factor: float | torch.Tensor) -> None:
        """Multiply all gradients."""
        for shard in self.row_shards:
            shard.rows.main_grad.mul_(factor)


def connect_optimizer(optimizer: Any) -> None:
    """Make Megatron's optimizer of ``FullyShardedChunk``'s rows sum gradient norms over all ranks.

    Megatron's distributed optimizer does so by itself.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.grad_stats_parallel_group = dist.group.WORLD
        # Weights are in fp32 already, so the copy that uses this buffer has no tensor to copy,
        # which fused kernels refuse.
        part._dummy_overflow_buf = None


def _without_data(state: Any) -> Any:
    """Free the memory of a sharded tensor or a factory of several; leave other objects alone."""
    if isinstance(getattr(state, "data", None), torch.Tensor):
        state.data = torch.empty_like(state.data, device="meta")
    return state
