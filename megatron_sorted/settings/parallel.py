"""Settings of the device and of the parallel layout, with their rules."""

from dataclasses import dataclass
from typing import Literal

from megatron_sorted.settings.field import AllSettings, flag_of, setting
from megatron_sorted.settings.require import require

NPU_KERNELS = ("attention", "rms_norm", "rotary", "swiglu")


@dataclass(frozen=True)
class ParallelSettings:
    """Device and parallel layout, named as in Megatron-LM."""

    world_size: int | None = setting(
        None,
        "Number of processes the run is meant for, read by plans and launchers; training uses the "
        "number that torchrun or srun starts.",
    )
    planned_device: str | None = setting(
        None,
        "Model of device that plans are made for, such as H100 or 910B2 (docs/planning.md); by "
        "default it follows from --device.",
    )
    device: Literal["auto", "cpu", "cuda", "npu"] = setting(
        "auto", "Type of device; 'auto' chooses an accelerator if there is one."
    )
    distributed_backend: Literal["auto", "nccl", "hccl", "gloo"] = setting(
        "auto", "Communication library; 'auto' is nccl on cuda, hccl on npu and gloo on cpu."
    )
    npu_adaptor: Literal["none", "mindspeed", "megatron_adaptor"] = setting(
        "none",
        "The package of Ascend's that patches Megatron for NPUs: MindSpeed or, from megatron-core "
        "0.17 on, MegatronAdaptor.",
    )
    npu_adaptor_arguments: str = setting(
        "",
        'The adaptor\'s flags, as one argument: --npu-adaptor-arguments="--optimization-level 1".',
    )
    npu_kernels: tuple[str, ...] = setting(
        NPU_KERNELS, "Operations that run as fused kernels on NPUs; the others run as torch's own."
    )
    npu_coalesced_collectives: bool = setting(
        True,
        "Pass the collectives of several buckets to HCCL as one call; if off, each is a call of "
        "its own, for versions of CANN without that function.",
    )
    distributed_timeout_minutes: int = setting(
        10, "Minutes after which an unfinished collective operation is an error."
    )
    hang_timeout_minutes: float | None = setting(
        None,
        "Minutes without progress after which the job ends with an error that names the ranks "
        "that hang; by default --distributed-timeout-minutes.",
    )
    tensor_model_parallel_size: int = setting(
        1, "Number of processes each layer's matrices are split over."
    )
    pipeline_model_parallel_size: int = setting(1, "Number of pipeline stages.")
    num_layers_per_virtual_pipeline_stage: int | None = setting(
        None,
        "Number of layers of one model chunk; a stage then holds several chunks (interleaved "
        "schedule).",
    )
    decoder_first_pipeline_num_layers: int | None = setting(
        None, "Number of layers on the first stage; by default an equal share."
    )
    decoder_last_pipeline_num_layers: int | None = setting(
        None, "Number of layers on the last stage; by default an equal share."
    )
    pipeline_model_parallel_layout: str | None = setting(
        None,
        "Layers of every model chunk in the order in which a token passes them, as in "
        "'Et*3|t*5|t*5|t*4L' (t layer, E embedding, L loss, | next chunk, x*n and (...)*n "
        "repetition); more chunks than stages make the schedule interleaved.",
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
        "Whether every data parallel rank holds all weights (ddp), or a shard of weights, "
        "gradients and optimizer state (fsdp).",
    )
    use_distributed_optimizer: bool = setting(
        False, "Split optimizer state over data parallel ranks."
    )
    overlap_grad_reduce: bool = setting(False, "Overlap gradient reduction with the backward pass.")
    overlap_param_gather: bool = setting(
        False, "Overlap parameter gathering with the forward pass (distributed optimizer)."
    )
    recompute_granularity: Literal["none", "selective", "full"] = setting(
        "none",
        "What is recomputed in the backward pass instead of being kept: nothing (none), the "
        "--recompute-modules of every layer (selective), or whole layers (full).",
    )
    recompute_method: Literal["uniform", "block"] = setting(
        "uniform",
        "Which layers between two exits full recomputation covers: all, in groups of "
        "--recompute-num-layers (uniform), or only the first --recompute-num-layers (block).",
    )
    recompute_num_layers: int = setting(
        1,
        "Number of layers in a group (uniform), or of recomputed layers between two exits (block).",
    )
    recompute_modules: tuple[str, ...] = setting(
        ("core_attn",), "Modules that selective recomputation computes again."
    )


ALLOWED_BACKENDS = {"cpu": ("gloo",), "cuda": ("nccl", "gloo"), "npu": ("hccl",)}
"""{device: the communication libraries that can move its data}; 'auto' is resolved on the host."""


def check_device(settings: AllSettings) -> None:
    """Check that the settings of the device fit together.

    Raises:
        SettingsError: They do not.
    """
    device, backend = settings.device, settings.distributed_backend
    allowed = ALLOWED_BACKENDS.get(device, (backend,))
    require(
        backend in ("auto", *allowed),
        f"--distributed-backend: {backend} cannot move data of --device {device}. Use "
        f"{' or '.join((*allowed, 'auto'))}.",
    )
    require(
        device != "cpu" or settings.transformer_impl != "transformer_engine",
        "--transformer-impl: transformer_engine cannot run on --device cpu. Use local or auto.",
    )
    for name in settings.npu_kernels:
        require(
            name in NPU_KERNELS,
            f"--npu-kernels: {name!r} is not a fused operation. Use some of "
            f"{', '.join(NPU_KERNELS)}.",
        )
    adaptor = settings.npu_adaptor
    require(
        adaptor == "none" or device in ("auto", "npu"),
        f"--npu-adaptor: {adaptor} patches Megatron for NPUs, not for --device {device}. Use "
        "--device npu, or leave the adaptor out.",
    )
    require(
        adaptor != "none" or not settings.npu_adaptor_arguments,
        f"--npu-adaptor-arguments: {settings.npu_adaptor_arguments!r} has no effect without an "
        "adaptor. Give --npu-adaptor mindspeed or megatron_adaptor, or leave them out.",
    )
    require(
        settings.npu_coalesced_collectives or device in ("auto", "npu"),
        f"--no-npu-coalesced-collectives: it concerns HCCL, not --device {device}. Use --device "
        "npu, or leave it out.",
    )


# parallel sizes that must be 1 when parameters are sharded over data parallel ranks
FSDP_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)
UNSUPPORTED = {
    "use_distributed_optimizer": "the optimizer state is sharded with the parameters",
    "overlap_grad_reduce": "torch overlaps it with the backward of the next layer by itself",
    "overlap_param_gather": "torch gathers a layer while the one before it runs by itself",
    "num_experts": "experts are sharded over groups of their own",
    "lora_rank": "most parameters are frozen, so there is little to shard",
    "tune_exit": "most parameters are frozen, so there is little to shard",
    "use_exit_block": "layers of exits run in backward, where torch does not gather them",
    "use_exit_mlp": "layers of exits run in backward, where torch does not gather them",
    "exit_adapter_rank": "adapters of exits run in backward, where torch does not gather them",
    "exit_kd_weight": (
        "the teacher's norm and output matrix are read in backward, where torch does not gather "
        "them"
    ),
    "exit_kd_teacher": (
        "the teacher's norm and output matrix are read in backward, where torch does not gather "
        "them"
    ),
}
"""{setting that FSDP does not support: why}."""


def check_data_parallel(settings: AllSettings) -> None:
    """Check that layout and network can be sharded over data parallel ranks, where it is requested.

    Raises:
        SettingsError: They cannot.
    """
    if settings.data_parallel == "ddp":
        return
    for name in FSDP_SIZES:
        size = getattr(settings, name)
        require(
            size == 1,
            f"--data-parallel: fsdp with {flag_of(name)} {size}: parameters are sharded over data "
            "parallel ranks alone. Use 1, or --data-parallel ddp with --use-distributed-optimizer.",
        )
    for name, reason in UNSUPPORTED.items():
        value = getattr(settings, name)
        given = flag_of(name) if value is True else f"{flag_of(name)} {value}"
        require(not value, f"--data-parallel: fsdp with {given}: {reason}. Leave one of them out.")
    require(
        settings.optimizer == "adam",
        f"--data-parallel: fsdp with --optimizer {settings.optimizer}: only the state of adam is "
        "kept in the form that every layout reads. Use adam, or --data-parallel ddp.",
    )
