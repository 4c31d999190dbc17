"""Corrections to checkpoints of Megatron's optimizers, made from outside its code.

They are needed with megatron-core 0.16 to 0.19; tests/ranks/test_checkpoint.py fails without any
one of them.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from megatron_sorted.checkpoint.sharding.chained_state import states_of_optimizers
from megatron_sorted.checkpoint.sharding.optimizer_shards import parts_of, take_state_of_parts
from megatron_sorted.platform.state import current_device

MAIN_WEIGHTS = "fp32_from_fp16_params"  # Megatron's
OF_PARAMETERS = ("parts", "param_state", "param_state_sharding_type")


def count_padding_in_offsets(chunks: list) -> None:
    """Make the offsets of saved optimizer state agree with parameters' places in their buffer.

    A bucket is padded to a multiple of the data parallel size. Parameters' places count that
    padding, but saving adds up bucket sizes without it: after a padded bucket, every parameter's
    moments would be cut from the wrong place and the last ones lost (Megatron only warns: "param
    range exceeds unpadded buffer"). With the padding counted as content, both agree.
    """
    for chunk in chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()


def fill_empty_state(optimizer) -> None:
    """Give torch's own Adam, before its first step, the state that a loaded one replaces.

    Before its first step the distributed optimizer has no state, and loading fails at the missing
    step count. The fused Adams of Apex and Transformer Engine keep the count elsewhere and need no
    correction.
    """
    for one in parts_of(optimizer):
        inner = getattr(one, "optimizer", None)
        if not _is_torchs_adam(inner) or inner.state:
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                inner.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def give_sgd_an_initial_state(optimizer) -> None:
    """Give torch's SGD a function that initialises its state, which Megatron needs to load it."""
    for one in parts_of(optimizer):
        if (
            isinstance(getattr(one, "optimizer", None), torch.optim.SGD)
            and one.init_state_fn is None
        ):
            one.init_state_fn = _start_momentum


def _start_momentum(optimizer: torch.optim.SGD, _config: Any = None) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def steps_taken(optimizer) -> int:
    """Return the number of steps that the optimizer has taken, the same on all ranks.

    A rank whose parameters are all frozen, or that has no share of a distributed optimizer, does
    not count steps. A checkpoint keeps one count for all, which the first rank writes.

    Collective: one all-reduce of a number over all ranks.
    """
    counts = [0.0]
    for one in parts_of(optimizer):
        counts += [
            float(entries["step"]) for entries in one.optimizer.state.values() if "step" in entries
        ]
        counts += [
            float(group["step"])
            for group in one.optimizer.param_groups
            if group.get("step") is not None
        ]
    most = torch.tensor(max(counts), device=current_device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=dist.group.WORLD)
    return int(most.item())


def state_dict_with_steps(one, steps: int) -> dict[str, Any]:
    """Return the distributed optimizer's own ``state_dict`` with ``steps`` as the step count.

    Without a step count it would fail.
    """
    inner = one.optimizer
    if not _is_torchs_adam(inner):
        state = one.state_dict()
        for group in state["optimizer"]["param_groups"]:
            group.setdefault("step", steps)
        return state
    if inner.state:
        return one.state_dict()
    # torch lists entries whose key is not a parameter unchanged
    inner.state["steps"] = {"step": torch.tensor(float(steps))}
    try:
        return one.state_dict()
    finally:
        del inner.state["steps"]


def complete_empty_state(one, state: dict[str, Any], steps: int) -> None:
    """Complete the sharded state dict of an optimizer that is not distributed.

    After it any rank may write the state, even one that trains no parameter. The step count is
    added where no parameter has it. The groups of main weights become dictionaries, which
    ``load_optimizer_state`` reverts: Megatron keeps an empty list of the first rank and cannot
    merge it with another rank's.
    """
    if MAIN_WEIGHTS in state:
        state[MAIN_WEIGHTS] = {
            index: dict(enumerate(group)) for index, group in enumerate(state[MAIN_WEIGHTS])
        }
    own = state.get("optimizer", state)
    if not _is_torchs_adam(one.optimizer):
        for group in own["param_groups"] if steps else ():
            if "betas" in group:  # Muon has none, and a count of it would stand still
                group.setdefault("step", steps)
    elif steps and "state" in own:  # which Megatron's form of a distributed optimizer lacks
        own["state"].setdefault("common_step", torch.tensor(float(steps)))


def _is_torchs_adam(inner) -> bool:
    return isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))


def _own_steps(one) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Remove the step counts from the state of torch's own Adam, and return them by parameter.

    Other optimizers have none.
    """
    return {
        parameter: entries.pop("step")
        for parameter, entries in one.optimizer.state.items()
        if "step" in entries
    }


def load_optimizer_state(optimizer, state: Any) -> None:
    """Load a state that ``checkpoint.sharding.sharded.optimizer_state`` saved.

    The distributed optimizer copies every entry of an optimizer's state from the checkpoint, but
    the step count of torch's own Adam is saved once, not for each parameter (KeyError: 'step'). So
    counts are removed while the other entries are copied. Then every parameter gets a separate
    count: Megatron gives the same tensor to all, and each parameter's step would increment it.
    """
    parts = parts_of(optimizer)
    for one, part in zip(parts, states_of_optimizers(state, parts), strict=True):
        if isinstance(one, Float16OptimizerWithFloat16Params) and not isinstance(
            part.get(MAIN_WEIGHTS), list
        ):
            loaded = part.get(MAIN_WEIGHTS, {})
            part[MAIN_WEIGHTS] = [
                [tensor for _, tensor in sorted(loaded.get(index, {}).items())]
                for index in range(len(one.optimizer.param_groups))
            ]
        if "parts" not in part and (
            "param_state" not in part or not _is_torchs_adam(one.optimizer)
        ):
            one.load_state_dict(part)
            continue
        one.load_state_dict({key: value for key, value in part.items() if key not in OF_PARAMETERS})
        steps = _own_steps(one)
        if "parts" in part:
            take_state_of_parts(one, part["parts"])
        else:
            one.load_parameter_state_from_fully_reshardable(part["param_state"])
        for parameter, step in steps.items():
            one.optimizer.state[parameter]["step"] = step.clone()
