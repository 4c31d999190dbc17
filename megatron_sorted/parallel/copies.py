"""Parameters that several pipeline stages hold a copy of: the output matrix (or tied embedding) and the final norm.

Every stage with an exit reads it through a copy of its own. Copies start equal and receive the same summed gradient, so they
stay bitwise equal. Megatron's own tying covers the first and the last stage only.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state


@dataclass(frozen=True)
class SharedCopies:
    """The copies this rank holds of one shared parameter set, and the group of the ranks that hold one."""

    parameters: tuple[torch.nn.Parameter, ...]
    group: dist.ProcessGroup

    def start_equal(self) -> None:
        """Give every copy the values of the first stage's.

        Collective: one broadcast a parameter, over ``group``.
        """
        source = dist.get_process_group_ranks(self.group)[0]
        for parameter in self.parameters:
            dist.broadcast(parameter.data, source, group=self.group)

    def sum_gradients(self) -> None:
        """Add up the gradients of all copies, so that each takes the same optimizer step.

        With the distributed optimizer this runs after gradients were reduce-scattered: the shared parameter has a bucket of its
        own (``shared_embedding``), so each rank's valid shard lines up with the same shard on the other stages.

        Collective: one all-reduce a parameter, over ``group``, of the parameter's size.
        """
        for parameter in self.parameters:
            if (
                parameter.requires_grad
            ):  # all copies of a frozen one keep their values, and it has no gradient
                dist.all_reduce(parameter.main_grad, group=self.group)


def stage_group(stages: tuple[int, ...]) -> dist.ProcessGroup | None:
    """Return the group of this rank's pipeline that holds ``stages``, or None where this rank's stage is none of them.

    Collective: creates one group for each pipeline of the layout; every process must call it in the same order.
    """
    mine = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    world_size = dist.get_world_size()
    stride = world_size // len(
        mine
    )  # pipelines are the outermost dimension of Megatron's numbering
    assert mine == list(range(mine[0] % stride, world_size, stride)), (
        "Megatron numbers ranks in another order"
    )
    found = None
    for first in range(stride):
        ranks = range(first, world_size, stride)
        members = [ranks[stage] for stage in stages]
        group = dist.new_group(members)
        if dist.get_rank() in members:
            found = group
    return found


def connect_copies(
    parameters: dict[str, list[torch.nn.Parameter]], stages: dict[str, tuple[int, ...]]
) -> list[SharedCopies]:
    """Return the shared parameter sets of this rank, marked for Megatron and with equal values on all stages.

    Marks: ``shared_embedding`` (own gradient bucket, see ``SharedCopies.sum_gradients``) on every copy; ``shared`` (left out of
    the gradient norm) and ``copy_index`` on all but the first stage's. Call before parameters are put in gradient buffers.

    Collective: creates groups and broadcasts parameters; every process must call it.

    Args:
        parameters: Per kind ("head", "norm") the parameters registered on this rank; none if it holds no copy.
        stages: Per kind the stages that hold a copy, the first of them being the source.
    """
    result = []
    for kind in sorted(stages):
        if len(stages[kind]) < 2:
            continue
        group = stage_group(stages[kind])
        if group is None:
            continue
        index = dist.get_group_rank(group, dist.get_rank())
        for parameter in parameters[kind]:
            parameter.shared_embedding = True
            if index > 0:
                parameter.shared = True
                parameter.copy_index = index
        copies = SharedCopies(tuple(parameters[kind]), group)
        copies.start_equal()
        result.append(copies)
    return result
