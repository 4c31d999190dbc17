"""The names of Megatron beyond its documented interface that this program uses, and whether they
are there.

A version of Megatron that lacks one would fail later, or silently compute something else. The table
stands in docs/megatron_versions.md too.
"""

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Name:
    """One name.

    Attributes:
        module: Module below megatron.core.
        path: Name in the module; attributes of classes with a dot. Alternatives are separated by
            "|": versions call it by one or the other.
        used_by: The folder or file of this program that uses it.
        purpose: What for.
    """

    module: str
    path: str
    used_by: str
    purpose: str

    @property
    def shown(self) -> str:
        """Return the full name."""
        return f"megatron.core.{self.module}.{self.path}"

    def is_there(self) -> bool:
        """Return whether this megatron-core has it."""
        module = importlib.import_module(f"megatron.core.{self.module}")
        return any(_has(module, path) for path in self.path.split("|"))


def _has(owner: object, path: str) -> bool:
    for part in path.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True


_MAPPINGS = "tensor_parallel.mappings"
_OPTIMIZER, _DISTRIBUTED = "optimizer.optimizer", "optimizer.distrib_optimizer"
NAMES = (
    Name(_MAPPINGS, "_gather_along_first_dim", "loss/", "sequence parallelism without autograd"),
    Name(
        _MAPPINGS,
        "_reduce_scatter_along_first_dim",
        "loss/",
        "sequence parallelism without autograd",
    ),
    Name(
        "dist_checkpointing.strategies.torch",
        "_replace_state_dict_keys_with_sharded_keys",
        "checkpoint/saver.py",
        "saving in two halves",
    ),
    Name(
        _DISTRIBUTED,
        "DistributedOptimizer._get_model_param_range_map",
        "checkpoint/sharding/",
        "each rank's part of the optimizer's state",
    ),
    Name(
        _DISTRIBUTED,
        "DistributedOptimizer._get_main_param_and_optimizer_states",
        "checkpoint/sharding/",
        "each rank's part of the optimizer's state",
    ),
    Name(
        _OPTIMIZER,
        "MegatronOptimizer.get_grads_for_grad_norm|MegatronOptimizer.get_main_grads_for_grad_norm",
        "platform/versions.py",
        "the gradient norm, read later than Megatron would",
    ),
    Name(
        _OPTIMIZER,
        "MegatronOptimizer.get_grad_stats_parallel_group",
        "training/step/train_step.py",
        "the ranks that sum a gradient norm",
    ),
    Name(
        _OPTIMIZER,
        "MegatronOptimizer.step_with_ready_grads",
        "training/step/train_step.py",
        "an optimizer step behind the check for finite numbers",
    ),
    Name(
        "tensor_parallel.random",
        "_get_cuda_rng_state",
        "platform/cpu.py",
        "the random state of CPUs",
    ),
    Name(
        "tensor_parallel.random",
        "_set_cuda_rng_state",
        "platform/cpu.py",
        "the random state of CPUs",
    ),
    Name(
        "models.common.embeddings.rope_utils",
        "fused_apply_rotary_pos_emb",
        "platform/npu/device.py",
        "the device's rotary embedding",
    ),
)


def missing_names() -> list[str]:
    """Return the names that this megatron-core lacks, or the reason why it cannot be imported."""
    missing = []
    for name in NAMES:
        try:
            if not name.is_there():
                missing.append(name.shown)
        except Exception as error:  # an untried version may fail in any way at import
            missing.append(f"{name.shown} ({type(error).__name__}: {error})")
    return missing
