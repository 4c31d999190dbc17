"""Rates of devices and links that plans need."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from megatron_sorted.device_rates import peak_rates_of
from megatron_sorted.errors import SettingsError
from megatron_sorted.reading.json_text import read_json_object
from megatron_sorted.reading.shown import shown

GB = 10**9
TERA = 10**12


@dataclass(frozen=True)
class Device:
    """One device and its links to others.

    Attributes:
        half_flops, single_flops: Published peak of dense matrix products in bf16 or fp16, and in
            fp32. Unit: operations a second.
        efficiency: Share of that peak that large matrix products reach.
        memory_bytes: Memory of one device, as a program sees it.
        reserved_bytes: The part of it for driver, communication buffers and fragments.
        memory_rate: Bytes a second that element-wise kernels read and write.
        near_rate, far_rate: Bytes a second that one device sends and at the same time receives,
            within its host and between hosts, as collectives reach them.
        near_delay, far_delay: Seconds that a collective or message takes whatever its size.
        per_host: Number of devices of one host.
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


def _gpu(name: str, memory: float, memory_rate: float, near: float, far: float = 25) -> Device:
    peak = peak_rates_of(name)
    return Device(
        half_flops=peak.bf16 * TERA,
        single_flops=peak.fp32 * TERA,
        efficiency=0.7,
        memory_bytes=int(memory * GB),
        reserved_bytes=3 * GB,
        memory_rate=0.8 * memory_rate * TERA,
        near_rate=0.75 * near * GB,
        far_rate=0.8 * far * GB,
        near_delay=15e-6,
        far_delay=25e-6,
        per_host=8,
        kernel_delay=2e-4,
    )


def _ascend(name: str, memory: float = 62432 * 2**20 / GB, per_host: int = 8) -> Device:
    half = peak_rates_of(name).bf16
    return Device(
        half_flops=half * TERA,
        single_flops=half / 4 * TERA,  # assumed: no rate is published
        efficiency=0.7,
        memory_bytes=int(memory * GB),
        reserved_bytes=3 * GB,
        memory_rate=0.8 * 1.6 * TERA,
        near_rate=0.75 * 196 * GB,
        far_rate=0.8 * 25 * GB,
        near_delay=20e-6,
        far_delay=30e-6,
        per_host=per_host,
        kernel_delay=3e-4,
    )


DEVICES = {
    # NVIDIA's data sheets. Near: NVLink in one direction; far: a 200 or 400 Gb/s adapter for each
    # GPU.
    "A100": _gpu("A100", 85.1, 2.0, 300),
    "H100": _gpu("H100 HBM3", 85.0, 3.35, 450, 50),
    "H200": _gpu("H200", 150.0, 4.8, 450, 50),
    # 64 GB of 1.6 TB/s, 8 in a full mesh of 392 GB/s in both directions together, 200 Gb/s links.
    "910B1": _ascend("ASCEND910B1"),
    "910B2": _ascend("ASCEND910B2"),
    "910B3": _ascend("ASCEND910B3"),
    "910B4": _ascend("ASCEND910B4", memory=30.5),
    "910C": _ascend("ASCEND910 9392", per_host=16),
    # One core; `megatron-sorted plan --calibrate` measures those of this machine.
    "cpu": Device(
        half_flops=2.0e10,
        single_flops=6.0e10,
        efficiency=0.9,
        memory_bytes=16 * GB,
        reserved_bytes=0,
        memory_rate=8.0e9,
        near_rate=1.5e9,
        far_rate=1.0e9,
        near_delay=3e-4,
        far_delay=5e-4,
        per_host=64,
        kernel_delay=3e-4,
        fused=False,
    ),
}
"""Devices by name.

Efficiencies and the share of link rates that collectives reach (0.75 and 0.8) come from experience,
and are not measured here.
"""


CAN_BE_ZERO = ("reserved_bytes", "near_delay", "far_delay", "kernel_delay")


def device_named(name: str, changes: Path | None = None) -> Device:
    """Return a device of the table, with fields replaced by those of a JSON file.

    Raises:
        SettingsError: The table has no such device; or the file has an unknown field or a value out
            of range.
    """
    if name not in DEVICES:
        raise SettingsError(
            f"--planned-device: {name} is not in the table of devices. "
            f"Use one of {', '.join(DEVICES)}."
        )
    if changes is None:
        return DEVICES[name]
    values = read_json_object(
        changes, "Give --device-file a file that --calibrate wrote.", SettingsError
    )
    known = sorted(field.name for field in fields(Device))
    problems = [f"fields of a device are {', '.join(known)}"] * (not set(values) <= set(known))
    problems += filter(None, (_problem(field, value) for field, value in values.items()))
    if problems:
        raise SettingsError(
            f"--device-file: {shown(changes)} is not a JSON object with fields of a device "
            f"({problems[0]}). Write one with --calibrate."
        )
    return replace(DEVICES[name], **values)


def _problem(field: str, value: object) -> str | None:
    """Return why a device's field cannot have this value; None if it can."""
    if field == "fused":
        return None if isinstance(value, bool) else f"fused is {value!r:.40} and not true or false"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    zero = field in CAN_BE_ZERO
    if is_number and value < float("inf") and (value > 0 or (value == 0 and zero)):
        return None
    return f"{field} is {value!r:.40} and not a number {'of at least' if zero else 'above'} 0"
