"""What fully sharded data parallelism goes together with."""

from megatron_sorted.settings.flags import flag_of
from megatron_sorted.settings.require import require
from megatron_sorted.settings.run import Settings

# Sizes of which a network that is sharded over data parallel ranks alone has 1.
SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size")
# What it does not know, and why.
UNKNOWN = {
    "use_distributed_optimizer": "optimizer state is sharded with the parameters",
    "overlap_grad_reduce": "torch overlaps the reduction of a layer with the backward of the next by itself",
    "overlap_param_gather": "torch gathers a layer while the one before it runs by itself",
    "num_experts": "experts are sharded over groups of their own",
    "lora_rank": "most parameters are frozen, so there is little to shard",
    "tune_exit": "most parameters are frozen, so there is little to shard",
    "use_exit_block": "layers of exits run in backward, where torch does not gather them",
    "use_exit_mlp": "layers of exits run in backward, where torch does not gather them",
    "exit_adapter_rank": "adapters of exits run in backward, where torch does not gather them",
    "exit_kd_weight": "the teacher's norm and output matrix are read in backward, where torch does not gather them",
    "exit_kd_teacher": "the teacher's norm and output matrix are read in backward, where torch does not gather them",
}


def check_data_parallel(settings: Settings) -> None:
    """Returns nothing if the layout and the network can be sharded over data parallel ranks, where that is asked for.

    Raises:
        SettingsError: they cannot.
    """
    if settings.data_parallel == "ddp":
        return
    for name in SIZES:
        size = getattr(settings, name)
        require(size == 1, f"--data-parallel: fsdp with {flag_of(name)} {size}: parameters are sharded over data parallel ranks alone. "
                           "Use 1, or --data-parallel ddp with --use-distributed-optimizer.")
    for name, reason in UNKNOWN.items():
        value = getattr(settings, name)
        said = flag_of(name) if value is True else f"{flag_of(name)} {value}"
        require(not value, f"--data-parallel: fsdp with {said}: {reason}. Leave one of them out.")
    require(settings.optimizer == "adam", f"--data-parallel: fsdp with --optimizer {settings.optimizer}: only the state of adam is kept in "
                                          "the form that every layout reads. Use adam, or --data-parallel ddp.")
