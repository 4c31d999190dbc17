"""How a run is spread over devices, which devices, and what they allow."""

from dataclasses import dataclass
from typing import Literal

from megatron_sorted.settings.field import AllSettings, flag_of, setting
from megatron_sorted.settings.require import require

NPU_KERNELS = ("attention", "rms_norm", "rotary", "swiglu")


@dataclass(frozen=True)
class ParallelSettings:
    """Device and parallel layout, in Megatron-LM's words."""

    world_size: int | None = setting(
        None,
        "Processes the run is meant for, as plans and launchers read it; training takes what torchrun or srun starts.",
    )
    planned_device: str | None = setting(
        None,
        "Device that plans are made for, such as H100 or 910B2 (docs/planning.md); by default the usual one of --device.",
    )
    device: Literal["auto", "cpu", "cuda", "npu"] = setting(
        "auto", "Where to run; 'auto' takes an accelerator if there is one."
    )
    distributed_backend: Literal["auto", "nccl", "hccl", "gloo"] = setting(
        "auto", "Communication library; 'auto' is nccl on cuda, hccl on npu and gloo on cpu."
    )
    npu_adaptor: Literal["none", "mindspeed"] = setting(
        "none", "Whether MindSpeed patches Megatron for Ascend NPUs."
    )
    npu_adaptor_arguments: str = setting(
        "", 'MindSpeed\'s own flags, in one word: --npu-adaptor-arguments="--optimization-level 1".'
    )
    npu_kernels: tuple[str, ...] = setting(
        NPU_KERNELS, "Fused operations used on NPUs; for the others torch's own run."
    )
    npu_coalesced_collectives: bool = setting(
        True,
        "Hand the collectives of several buckets to HCCL as one; without it each is a call of its own, for CANNs that cannot.",
    )
    distributed_timeout_minutes: int = setting(
        10, "Minutes after which a collective operation that does not end is an error."
    )
    hang_timeout_minutes: float | None = setting(
        None,
        "Minutes without progress after which the job is ended and the ranks that hang are named; by default "
        "--distributed-timeout-minutes.",
    )
    tensor_model_parallel_size: int = setting(
        1, "Number of processes each layer's matrices are split over."
    )
    pipeline_model_parallel_size: int = setting(1, "Number of pipeline stages.")
    num_layers_per_virtual_pipeline_stage: int | None = setting(
        None, "Layers of one chunk; a stage then holds several chunks (interleaved schedule)."
    )
    decoder_first_pipeline_num_layers: int | None = setting(
        None, "Layers on the first stage, when it is not to hold an equal share."
    )
    decoder_last_pipeline_num_layers: int | None = setting(
        None, "Layers on the last stage, when it is not to hold an equal share."
    )
    pipeline_model_parallel_layout: str | None = setting(
        None,
        "Layers of every chunk in the order in which a token passes them, as in 'Et*3|t*5|t*5|t*4L' (t layer, E embedding, L loss, "
        "| next chunk, x*n and (...)*n repetition); more chunks than stages make the schedule interleaved.",
    )
    overlap_p2p_communication: bool = setting(
        True, "Overlap messages between stages with computation in the interleaved schedule."
    )
    sequence_parallel: bool = setting(
        False, "Also split activations along the sequence over tensor parallel ranks."
    )
    context_parallel_size: int = setting(
        1, "Number of processes each sequence is split over (needs Transformer Engine)."
    )
    expert_model_parallel_size: int = setting(1, "Number of processes the experts are split over.")
    data_parallel: Literal["ddp", "fsdp"] = setting(
        "ddp",
        "Whether every data parallel rank holds all weights ('ddp'), or each a part of weights, gradients and optimizer state "
        "('fsdp').",
    )
    use_distributed_optimizer: bool = setting(
        False, "Split optimizer state over data parallel ranks."
    )
    overlap_grad_reduce: bool = setting(False, "Overlap gradient reduction with the backward pass.")
    overlap_param_gather: bool = setting(
        False, "Overlap parameter gathering with the forward pass (distributed optimizer)."
    )
    recompute_granularity: Literal["none", "selective", "full"] = setting(
        "none", "What is computed again in backward instead of kept."
    )
    recompute_method: Literal["uniform", "block"] = setting(
        "uniform", "How full recompute groups layers."
    )
    recompute_num_layers: int = setting(1, "Layers in one group of full recompute.")
    recompute_modules: tuple[str, ...] = setting(
        ("core_attn",), "What selective recompute computes again."
    )


# Libraries that move data of each device; which device "auto" is, a host says.
BACKENDS = {"cpu": ("gloo",), "cuda": ("nccl", "gloo"), "npu": ("hccl",)}


def check_device(settings: AllSettings) -> None:
    """Returns nothing if what is asked of the device goes together.

    Raises:
        SettingsError: it does not.
    """
    device, backend = settings.device, settings.distributed_backend
    able = BACKENDS.get(device, (backend,))
    require(
        backend in ("auto", *able),
        f"--distributed-backend: {backend} cannot move data of --device {device}. Use {' or '.join((*able, 'auto'))}.",
    )
    require(
        device != "cpu" or settings.transformer_impl != "transformer_engine",
        "--transformer-impl: transformer_engine cannot run on --device cpu. Use local or auto.",
    )
    for name in settings.npu_kernels:
        require(
            name in NPU_KERNELS,
            f"--npu-kernels: {name!r} is no fused operation. Use some of {', '.join(NPU_KERNELS)}.",
        )
    mindspeed = settings.npu_adaptor == "mindspeed"
    require(
        not mindspeed or device in ("auto", "npu"),
        f"--npu-adaptor: mindspeed patches Megatron for NPUs, not for --device {device}. Use --device npu, or leave the adaptor out.",
    )
    require(
        mindspeed or not settings.npu_adaptor_arguments,
        f"--npu-adaptor-arguments: nothing reads {settings.npu_adaptor_arguments!r} without an adaptor. Give --npu-adaptor mindspeed, "
        "or leave them out.",
    )
    require(
        settings.npu_coalesced_collectives or device in ("auto", "npu"),
        f"--no-npu-coalesced-collectives: is about HCCL, not about --device {device}. Use --device npu, or leave it out.",
    )


# Sizes of which a network that is sharded over data parallel ranks alone has 1.
SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)
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


def check_data_parallel(settings: AllSettings) -> None:
    """Returns nothing if the layout and the network can be sharded over data parallel ranks, where that is asked for.

    Raises:
        SettingsError: they cannot.
    """
    if settings.data_parallel == "ddp":
        return
    for name in SIZES:
        size = getattr(settings, name)
        require(
            size == 1,
            f"--data-parallel: fsdp with {flag_of(name)} {size}: parameters are sharded over data parallel ranks alone. "
            "Use 1, or --data-parallel ddp with --use-distributed-optimizer.",
        )
    for name, reason in UNKNOWN.items():
        value = getattr(settings, name)
        said = flag_of(name) if value is True else f"{flag_of(name)} {value}"
        require(not value, f"--data-parallel: fsdp with {said}: {reason}. Leave one of them out.")
    require(
        settings.optimizer == "adam",
        f"--data-parallel: fsdp with --optimizer {settings.optimizer}: only the state of adam is kept in "
        "the form that every layout reads. Use adam, or --data-parallel ddp.",
    )
