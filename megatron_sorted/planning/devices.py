"""Rates of devices, as far as a plan needs them."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from megatron_sorted.errors import SettingsError
from megatron_sorted.reading.json_text import read_json_object
from megatron_sorted.reading.shown import shown

GB = 10**9
TERA = 10**12


@dataclass(frozen=True)
class Device:
    """One device and how it is joined to others.

    Attributes:
        half_flops, single_flops: Published peak of dense matrix products, in operations a second: bf16 or fp16, and fp32.
        efficiency: Share of that peak that large matrix products reach.
        memory_bytes: Of one device, as a program sees it.
        reserved_bytes: Of it, what driver, communication buffers and fragments take.
        memory_rate: Bytes a second that element-wise kernels read and write.
        near_rate, far_rate: Bytes a second that one device sends and at the same time receives, within its host and between hosts, as
            collectives reach them.
        near_delay, far_delay: Seconds that a collective or message takes whatever its size.
        per_host: Devices of one host.
        kernel_delay: Seconds that a layer's pass takes at least, however small it is.
        fused: Whether norms and attention are single kernels that keep only what backward needs.
    """

    half_flops: float
    single_flops: float
    efficiency: float
    memory_bytes: int
    reserved_bytes: int
    memory_rate: float
    near_rate: float
    far_rate: float
    near_delay: float
    far_delay: float
    per_host: int
    kernel_delay: float
    fused: bool = True


def _gpu(
    half: float, single: float, memory: float, memory_rate: float, near: float, far: float = 25
) -> Device:
    return Device(
        half * TERA,
        single * TERA,
        0.7,
        int(memory * GB),
        3 * GB,
        0.8 * memory_rate * TERA,
        0.75 * near * GB,
        0.8 * far * GB,
        15e-6,
        25e-6,
        8,
        2e-4,
    )


def _ascend(
    half: float, memory: float = 62432 * 2**20 / GB, near: float = 196, per_host: int = 8
) -> Device:
    return Device(
        half * TERA,
        half / 4 * TERA,
        0.7,
        int(memory * GB),
        3 * GB,
        0.8 * 1.6 * TERA,
        0.75 * near * GB,
        0.8 * 25 * GB,
        20e-6,
        30e-6,
        per_host,
        3e-4,
    )


DEVICES = {
    # NVIDIA's data sheets; near: NVLink in one direction, far: a 200 or 400 Gb/s adapter for every GPU
    "A100": _gpu(312, 19.5, 85.1, 2.0, 300),
    "H100": _gpu(989, 67, 85.0, 3.35, 450, 50),
    "H200": _gpu(989, 67, 150.0, 4.8, 450, 50),
    # peaks: torchtitan's runs on Ascend; memory 64 GB of 1.6 TB/s, 8 in a full mesh of 392 GB/s both ways together, 200 Gb/s adapters
    "910B1": _ascend(373.9),
    "910B2": _ascend(353.9),
    "910B3": _ascend(294.9),
    "910B4": _ascend(245.8, memory=30.5),
    "910C": _ascend(353.9, per_host=16),
    # one core; `megatron-sorted plan --calibrate` measures the machine at hand
    "cpu": Device(
        2.0e10, 6.0e10, 0.9, 16 * GB, 0, 8.0e9, 1.5e9, 1.0e9, 3e-4, 5e-4, 64, 3e-4, fused=False
    ),
}
"""By name. Efficiencies and the share of link rates that collectives reach (0.75 and 0.8) are experience, not measured here."""


CAN_BE_NOTHING = ("reserved_bytes", "near_delay", "far_delay", "kernel_delay")


def _can_be(field: str, value: float) -> bool:
    """Return whether a device's number can have this value."""
    return value < float("inf") and (value > 0 or (value == 0 and field in CAN_BE_NOTHING))


def device_named(name: str, changes: Path | None = None) -> Device:
    """Return a device of the table, or the table's with fields replaced by those of a JSON file.

    Raises:
        SettingsError: There is none of that name, or the file names fields that no device has, or gives them what they cannot be.
    """
    if name not in DEVICES:
        raise SettingsError(
            f"--planned-device: {name} is not in the table of devices. Use one of {', '.join(DEVICES)}."
        )
    if changes is None:
        return DEVICES[name]
    values = read_json_object(
        changes, "Give --device-file a file that --calibrate wrote.", SettingsError
    )
    try:
        known = {field.name for field in fields(Device)}
        if not set(values) <= known:
            raise ValueError(f"fields of a device are {', '.join(sorted(known))}")
        for field, value in values.items():
            if field == "fused" and not isinstance(value, bool):
                raise ValueError(f"fused is {value!r:.40} and not true or false")
            if field != "fused" and (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not _can_be(field, value)
            ):
                raise ValueError(
                    f"{field} is {value!r:.40} and not a number {'of at least' if field in CAN_BE_NOTHING else 'above'} 0"
                )
    except ValueError as error:
        raise SettingsError(
            f"--device-file: {shown(changes)} is not a JSON object with fields of a device ({error}). "
            "Write one with --calibrate."
        ) from error
    return replace(DEVICES[name], **values)
