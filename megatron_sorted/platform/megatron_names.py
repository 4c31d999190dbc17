"""The names of Megatron beyond its documented interface without which this program cannot run.

A version that lacks one would fail later, or silently compute something else. The table in
docs/megatron_versions.md says what each is for.
"""

import importlib

_OPTIMIZER, _DISTRIBUTED = "optimizer.optimizer", "optimizer.distrib_optimizer"
NAMES = (
    ("tensor_parallel.mappings", "_gather_along_first_dim"),
    ("tensor_parallel.mappings", "_reduce_scatter_along_first_dim"),
    ("tensor_parallel.random", "_get_cuda_rng_state"),
    ("tensor_parallel.random", "_set_cuda_rng_state"),
    ("models.common.embeddings.rope_utils", "fused_apply_rotary_pos_emb"),
    ("models.common.embeddings.rotary_pos_embedding", "RotaryEmbedding.get_freqs_non_repeated"),
    (
        "models.common.embeddings.yarn_rotary_pos_embedding",
        "_yarn_get_concentration_factor_from_config",
    ),
    ("dist_checkpointing.strategies.torch", "_replace_state_dict_keys_with_sharded_keys"),
    (_DISTRIBUTED, "DistributedOptimizer._get_model_param_range_map"),
    (_DISTRIBUTED, "DistributedOptimizer._get_main_param_and_optimizer_states"),
    (_OPTIMIZER, "MegatronOptimizer.get_grad_stats_parallel_group"),
    (_OPTIMIZER, "MegatronOptimizer.step_with_ready_grads"),
    # the gradient norm is read later than Megatron would, by the one or the other
    (
        _OPTIMIZER,
        "MegatronOptimizer.get_grads_for_grad_norm|MegatronOptimizer.get_main_grads_for_grad_norm",
    ),
)
"""(module of megatron.core, name in it); an attribute of a class follows a dot, another name that
will do as well a bar."""


def missing_names() -> list[str]:
    """Return the names that this megatron-core lacks, with the error where a module has one."""
    missing = []
    for module, names in NAMES:
        full = f"megatron.core.{module}.{names}"
        try:
            owner = importlib.import_module(f"megatron.core.{module}")
            if not any(_has(owner, name) for name in names.split("|")):
                missing.append(full)
        except Exception as error:  # an untried version may fail in any way at import
            missing.append(f"{full} ({type(error).__name__}: {error})")
    return missing


def _has(owner: object, path: str) -> bool:
    for part in path.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True
