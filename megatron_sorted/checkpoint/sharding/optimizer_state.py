"""Mends of the distributed optimizer's checkpoints, from outside: Megatron's code stays as it is.

Met with megatron-core 0.16.1; tests/ranks/test_checkpoint.py fails without any one of them.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from megatron_sorted.checkpoint.sharding.optimizer_shards import parts_of, take_state_of_parts
from megatron_sorted.platform.state import current_device
from megatron_sorted.platform.versions import rules_of_groups_kept

MAIN_WEIGHTS = "fp32_from_fp16_params"  # Megatron's
OF_PARAMETERS = ("parts", "param_state", "param_state_sharding_type")


def count_padding_in_offsets(chunks: list) -> None:
    """Make the offsets of saved optimizer state agree with the places of parameters in their buffer.

    A bucket is padded to a multiple of the data parallel size. Parameters' places count that padding, but saving adds up bucket
    sizes without it: behind a padded bucket, every parameter's moments were cut from the wrong place and the last ones lost
    (Megatron only warns: "param range exceeds unpadded buffer"). With the padding counted as content, both agree.
    """
    for chunk in chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()


def fill_empty_state(optimizer) -> None:
    """Give torch's own Adam, where it has not stepped yet, the state that a loaded one replaces.

    Before its first step the distributed optimizer has no state, and loading stops at the missing step count. The fused Adams of
    Apex and Transformer Engine keep the count elsewhere and need nothing.
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


def give_sgd_a_first_state(optimizer) -> None:
    """Let Megatron load the state of torch's SGD, for which it has no function that makes the state a loaded one replaces."""
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
    """Return how many steps the optimizer has made, the same on all ranks.

    A rank whose parameters are all frozen, or whose share of a distributed optimizer's is none, has nothing that counts them. A checkpoint
    keeps one count for all, which the first rank writes.

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
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most.item())


def state_dict_with_steps(one, steps: int) -> dict[str, Any]:
    """Return the distributed optimizer's own ``state_dict``, which stops where it finds no step count, with ``steps`` as the count."""
    inner = one.optimizer
    if not _is_torchs_adam(inner):
        state = one.state_dict()
        for group in state["optimizer"]["param_groups"]:
            group.setdefault("step", steps)
        return state
    counted = bool(inner.state)
    if not counted:
        inner.state["steps"] = {
            "step": torch.tensor(float(steps))
        }  # torch lists what is kept under another key than a parameter as it is
    try:
        return one.state_dict()
    finally:
        if not counted:
            del inner.state["steps"]


def mend_empty_state(one, state: dict[str, Any], steps: int) -> None:
    """Make the sharded state dict of an optimizer that is not distributed one that any rank may write, also with nothing to train.

    The step count is put in where no parameter counts it. The groups of main weights become dictionaries (``load_optimizer_state`` undoes
    it): Megatron keeps an empty list of the first rank and cannot merge it with another rank's.
    """
    if MAIN_WEIGHTS in state:
        state[MAIN_WEIGHTS] = {
            index: dict(enumerate(group)) for index, group in enumerate(state[MAIN_WEIGHTS])
        }
    own = state.get("optimizer", state)
    if not _is_torchs_adam(one.optimizer):
        for group in own["param_groups"] if steps else ():
            group.setdefault("step", steps)
    elif steps and "state" in own:  # not in Megatron's own form of a distributed optimizer
        own["state"].setdefault("common_step", torch.tensor(float(steps)))


def _is_torchs_adam(inner) -> bool:
    return isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))


def _own_steps(one) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Return the step counts that torch's own Adam keeps with each parameter, taken out of its state; none for other optimizers."""
    return {
        parameter: entries.pop("step")
        for parameter, entries in one.optimizer.state.items()
        if "step" in entries
    }


def load_optimizer_state(optimizer, state: Any) -> None:
    """Load what ``checkpoint.sharded.optimizer_state`` saved.

    The distributed optimizer copies every entry of an optimizer's state from the checkpoint, but the step count of torch's own
    Adam is saved once, not for each parameter (KeyError: 'step'). So counts are put aside while the other entries are copied.
    Then every parameter gets a count of its own: Megatron gives all of them the same tensor, and each parameter's step counts it up.
    """
    parts = parts_of(optimizer)
    states = [state] if len(parts) == 1 else [state[index] for index in range(len(parts))]
    for one, part in zip(parts, states, strict=True):
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
            with rules_of_groups_kept(one.optimizer):
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
