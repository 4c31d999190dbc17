"""Rules about the device and what belongs to one kind of device."""

from megatron_sorted.settings.parallel import NPU_KERNELS
from megatron_sorted.settings.require import require
from megatron_sorted.settings.run import Settings

# Libraries that move data of each device; which device "auto" is, a host says.
BACKENDS = {"cpu": ("gloo",), "cuda": ("nccl", "gloo"), "npu": ("hccl",)}


def check_device(settings: Settings) -> None:
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
