"""Fully sharded data parallelism: parameters, gradients and optimizer state of one network, each rank keeping some rows of every matrix.

Torch's FSDP2 (``fully_shard``) gathers a layer when it runs and reduces its gradients when its backward is done. Exits need more: their
loss reads norm and output matrix in backward, outside any module's forward, and adds gradients to them by itself (``loss.gradient``). So
the stage says when an exit is about to be read and when it is done (``SortedStage.exit_hooks``), and for these parameters gathering and
reduction are done here. Megatron's optimizer is given the rows a rank keeps as ordinary parameters, which share their memory with torch's.
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


def check_torch_can_shard() -> None:
    """Check that this torch has what sharding needs.

    Raises:
        PlatformError: It is too old.
    """
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise PlatformError(
            f"--data-parallel fsdp: torch {torch.__version__} cannot sum gradients without dividing them "
            "(FSDPModule.set_force_sum_reduction_for_comms). Install torch 2.8 or later, or use --data-parallel ddp."
        )


@dataclass
class RowShard:
    """The rows of one parameter that this rank keeps; rows are cut as ``torch.chunk`` cuts them, so the last ranks may have none.

    Attributes:
        name: Of the parameter in the stage.
        sharded: Torch's parameter, whose local part this is.
        rows: The same memory as an ordinary fp32 parameter, for the optimizer; its ``main_grad`` is set once gradients are reduced.
        first_row: In the whole parameter.
        num_ranks: That share the parameter.
        gathered: The whole parameter as exits read it, once one has.
        sum: Where exits add their gradients to the whole parameter: fp32, padded to equal shares.
        from_exits: What this rank's rows have received of them.
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
        """Let exits add their gradients to the whole parameter in fp32."""
        if self.sum is None:
            share = -(-gathered.shape[0] // self.num_ranks)
            self.sum = torch.zeros(
                (share * self.num_ranks, *gathered.shape[1:]),
                dtype=torch.float32,
                device=gathered.device,
            )
        self.gathered, gathered.main_grad = gathered, self.sum[: gathered.shape[0]]

    def reduce_exits(self, group: dist.ProcessGroup) -> None:
        """Sum what exits added over all ranks, each receiving its rows.

        Collective: one reduce-scatter of the parameter's size in fp32, where an exit was read since the last one.
        """
        if self.sum is None:
            return
        share = self.sum.shape[0] // self.num_ranks
        mine = torch.empty(
            (share, *self.sum.shape[1:]), dtype=torch.float32, device=self.sum.device
        )
        dist.reduce_scatter_tensor(mine, self.sum, group=group)
        mine = mine[: self.rows.shape[0]]
        self.from_exits = mine if self.from_exits is None else self.from_exits.add_(mine)
        self.gathered.main_grad = self.sum = None

    def finish(self) -> None:
        """Make ``main_grad`` of what torch reduced for layers and what exits added; zero where neither happened."""
        native = self.sharded.grad.to_local() if self.sharded.grad is not None else None
        self.sharded.grad = None
        found = [part for part in (native, self.from_exits) if part is not None]
        gradient = found[0] if found else torch.zeros_like(self.rows, requires_grad=False)
        self.rows.main_grad = gradient.add_(found[1]) if len(found) > 1 else gradient
        self.from_exits = None

    def clear(self) -> None:
        """Forget all gradients."""
        if self.gathered is not None:
            self.gathered.main_grad = None
        self.sharded.grad = self.sum = self.from_exits = self.rows.grad = self.rows.main_grad = None


class FullyShardedStage(torch.nn.Module):
    """A whole network (one pipeline stage) as Megatron's schedules, gradient finalisation and optimizers use a wrapped model.

    Attributes:
        module: The stage.
        row_shards: What this rank keeps of every parameter.
        states: The stage's sharded state dict before it was sharded, tensors without data: {name: whole tensor or other object}.
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
            config: Megatron's.
            stage: A ``SortedStage`` with all layers.
            group: The data parallel ranks.
            device: Kind of device, as torch names it.
            dtype: Of the parameters as layers and exits see them; this rank's rows are kept in fp32.
            states: As the attribute, with data.
        """
        super().__init__()
        self.module, self.config, self.group = stage, config, group
        self.ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        self.buffers, self.expert_parallel_buffers = (
            [],
            [],
        )  # Megatron's names for what it would keep gradients in
        self._mean = 1.0 if config.calculate_per_token_loss else 1.0 / group.size()
        self.states = {name: _without_data(state) for name, state in states.items()}
        attributes = {name: dict(vars(parameter)) for name, parameter in stage.named_parameters()}
        mesh = DeviceMesh.from_group(group, device)
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        # what the embedding returns is a view, and an operation in place on it would lose torch's hook
        stage.embedding.register_forward_hook(
            lambda _module, _args, hidden: make_viewless_tensor(
                inp=hidden, requires_grad=hidden.requires_grad, keep_graph=True
            )
        )
        for unit in (*stage.decoder.layers, stage.embedding, *stage.heads.outputs):
            fully_shard(unit.float(), mesh=mesh, mp_policy=policy)
        # what is left are norms of exits: small, and read in backward, so they stay together until then
        fully_shard(stage.float(), mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        for module in stage.modules():
            if isinstance(module, FSDPModule):  # sums; Megatron's loss rule divides
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
        rows = torch.nn.Parameter(sharded.to_local().detach(), requires_grad=sharded.requires_grad)
        for key, value in attributes.items():  # which Megatron's optimizer asks for
            setattr(rows, key, value)
        ranks = self.group.size()
        share = -(-sharded.shape[0] // ranks)
        return RowShard(
            name, sharded, rows, min(self.group.rank() * share, sharded.shape[0]), ranks
        )

    def forward(self, *args, **kwargs) -> torch.Tensor:
        """Return the stage's output.

        Collective: gathers each layer when it runs (data parallel group); of evaluation also each exit's output matrix.
        """
        output = self.module(*args, **kwargs)
        if not torch.is_grad_enabled():  # no backward will do it
            for module in (self.module, *self.module.heads.outputs):
                module.reshard()
        return output

    def _read_by(self, depth: int) -> tuple[torch.nn.Module, list[RowShard]]:
        """Return the unit that gathers the output matrix of the exit at ``depth``, and the rows of matrix and norm."""
        own, stage = self.module.heads.by_depth[depth], self.module
        unit = own.output if isinstance(own.output, FSDPModule) else stage.embedding
        norm = self._names[own.norm]
        return unit, [
            self._by_name[f"{self._names[own.output]}.weight"],
            *(self._by_name[f"{norm}.{name}"] for name, _ in own.norm.named_parameters()),
        ]

    def _gather_exit(self, depth: int) -> None:
        """Gather what reads the exit, unless it is there, and give its gradients a place.

        Collective: one all-gather of the output matrix over the data parallel group, for the first exit of a pass that reads it.
        """
        unit, rows = self._read_by(depth)
        unit.unshard()
        if self.training:
            for shard in rows:
                shard.take_gradients_of(self.module.get_parameter(shard.name))

    def _finish_exit(self, depth: int) -> None:
        """Free an output matrix of the exit's own, with its gradient; a shared one stays until backward ends, its sum until the step does.

        Collective: for an output matrix of its own, that of ``RowShard.reduce_exits``.
        """
        if depth in self.module.plan.exit_heads:
            unit, rows = self._read_by(depth)
            rows[0].reduce_exits(self.group)
            unit.reshard()

    def named_parameters(self, *_args, **_kwargs) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield this rank's rows of every parameter, by the parameter's name."""
        return ((shard.name, shard.rows) for shard in self.row_shards)

    def zero_grad_buffer(self) -> None:
        """Forget all gradients (called before a step)."""
        for shard in self.row_shards:
            shard.clear()

    def finish_grad_sync(self, *_args, **_kwargs) -> None:
        """Make the gradient of this rank's rows, when all micro-batches are done.

        Collective: one reduce-scatter for every norm and shared output matrix that exits were read with (data parallel group).
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
    """Make Megatron's optimizer of the rows of ``FullyShardedStage`` count all ranks' gradients, as the one that is distributed does."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.grad_stats_parallel_group = dist.group.WORLD
        # its weights are fp32 already: the copy that this buffer serves has nothing to copy, which fused kernels refuse
        part._dummy_overflow_buf = None


def _without_data(state: Any) -> Any:
    """Return a sharded tensor, or the factory of several, whose tensor takes no memory any more; other objects as they are."""
    if isinstance(getattr(state, "data", None), torch.Tensor):
        state.data = torch.empty_like(state.data, device="meta")
    return state
