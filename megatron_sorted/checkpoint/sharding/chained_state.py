"""Optimizer state of experts that one layout spreads over ranks and another does not.

With expert parallelism Megatron chains two optimizers, the second for the experts; without it one
optimizer trains all parameters. The state of parameters has the same names in both, but what a
checkpoint keeps beside it (parameter groups, step count) is nested under the optimizer's number.
"""

from typing import Any

SAME_GROUP = ("wd_mult", "lr_mult")
"""What groups of the same kind have in common, whichever optimizer trains them."""


def _holder(part: dict[str, Any]) -> dict[str, Any]:
    """Return where a state keeps its groups; only Megatron's plain optimizer has them outside."""
    return part.get("optimizer", part)


def _groups(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parameter groups that were saved; one of this rank alone lists parameters only."""
    return [group for group in _holder(part).get("param_groups", ()) if set(group) - {"params"}]


def states_of_optimizers(state: dict[Any, Any], optimizers: list) -> list[dict[str, Any]]:
    """Return each optimizer's loaded state, also from a checkpoint of another number of them.

    Then each takes the step count of the first saved one, and its groups' numbers from the saved
    groups with the same factors of weight decay and learning rate.
    """
    numbered = [state[key] for key in sorted(key for key in state if isinstance(key, int))]
    plain = {key: value for key, value in state.items() if not isinstance(key, int)}
    own = [plain] if len(optimizers) == 1 else numbered
    saved = numbered if len(optimizers) == 1 else [plain]
    donors = [group for part in saved for group in _groups(part)]
    if not donors:
        return own
    for optimizer, part in zip(optimizers, own, strict=True):
        _complete(part, saved[0])
        holder = _holder(part)
        listed = holder.get("param_groups", [{}] * len(optimizer.optimizer.param_groups))
        holder["param_groups"] = [
            {
                **next(d for d in donors if all(d[name] == current[name] for name in SAME_GROUP)),
                "is_expert_parallel": current["is_expert_parallel"],
                "params": current["params"],
                **group,
            }
            for current, group in zip(optimizer.optimizer.param_groups, listed, strict=True)
        ]
    return own


def _complete(part: dict[str, Any], saved: dict[str, Any]) -> None:
    """Add to ``part`` what it lacks of ``saved``, except entries of single parameters."""
    for name, value in saved.items():
        if name == "param_groups" or isinstance(name, int):
            continue
        if isinstance(value, dict):
            _complete(part.setdefault(name, {}), value)
        else:
            part.setdefault(name, value)
