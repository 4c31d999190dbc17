"""Copies of a parameter on several pipeline stages.

These are the output matrix (or tied embedding) and the final norm: every stage reads its exits with
its own copy. Copies start equal and receive the same summed gradient, so they stay bitwise equal.
Megatron's own tying covers the first and the last stage only.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_sorted.parallel.groups import process_groups


@dataclass(frozen=True)
class SharedCopies:
    """This rank's copies of one set of shared parameters.

    Attributes:
        parameters: The copies.
        group: The ranks that hold copies of the same parameters.
    """

    parameters: tuple[torch.nn.Parameter, ...]
    group: dist.ProcessGroup

    def start_equal(self) -> None:
        """Copy the values of the first stage's parameters to all copies.

        Collective: one broadcast per parameter, over ``group``.
        """
        source = dist.get_process_group_ranks(self.group)[0]
        for parameter in self.parameters:
            dist.broadcast(parameter.data, source, group=self.group)

    def sum_gradients(self) -> None:
        """Sum the gradients of all copies, so that each takes the same optimizer step.

        With the distributed optimizer this runs after gradients were reduce-scattered: the shared
        parameter has a separate bucket (``shared_embedding``), so each rank's valid shard
        corresponds to the same shard on the other stages.

        Collective: one all-reduce per parameter, over ``group``, of the parameter's size.
        """
        for parameter in self.parameters:
            if parameter.requires_grad:  # a frozen one has no gradient
                dist.all_reduce(parameter.main_grad, group=self.group)


def stage_group(stages: tuple[int, ...]) -> dist.ProcessGroup | None:
    """Return the group of ``stages`` in this rank's pipeline; None if its stage is none of them.

    Collective: creates one group for each pipeline of the layout; every process must call it in the
        same order.
    """
    pipeline = dist.get_process_group_ranks(process_groups().pp)
    world_size = dist.get_world_size()
    # Megatron numbers the ranks of a stage consecutively
    stride = world_size // len(pipeline)
    assert pipeline == list(range(pipeline[0] % stride, world_size, stride)), (
        "Megatron numbers ranks in another order"
    )
    own_group = None
    for first in range(stride):
        ranks = range(first, world_size, stride)
        members = [ranks[stage] for stage in stages]
        group = dist.new_group(members)
        if dist.get_rank() in members:
            own_group = group
    return own_group


def connect_copies(
    parameters: dict[str, list[torch.nn.Parameter]], stages: dict[str, tuple[int, ...]]
) -> list[SharedCopies]:
    """Make the copies of shared parameters equal, and mark them for Megatron.

    Every copy is marked ``shared_embedding`` (a separate gradient bucket, see
    ``SharedCopies.sum_gradients``); all but the first stage's are marked ``shared`` (left out of
    the gradient norm) and have a ``copy_index``. Call it before parameters are put in gradient
    buffers.

    Collective: creates groups and broadcasts parameters; every process must call it.

    Args:
        parameters: {"head" or "norm": this rank's parameters}; empty if it holds no copy.
        stages: {"head" or "norm": the stages that hold a copy, the first being the source}.

    Returns:
        This rank's sets of copies.
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
