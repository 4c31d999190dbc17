"""Measure the NPUs of a host, one process for each: what they are, their rates, their correctness.

Started by lab/accept_npu.py through torchrun. Prints JSON lines.
"""

import argparse
import json
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_sorted.platform.npu.device import NpuPlatform
from megatron_sorted.platform.npu.start import start_npu

MIB = 2**20


def print_result(name: str, passed: bool, figure: str) -> None:
    """Print one result, on the first process."""
    if int(os.environ["RANK"]) == 0:
        print(json.dumps({"check": name, "passed": bool(passed), "figure": figure}), flush=True)


def seconds_of(platform: NpuPlatform, work: Callable[[], None], times: int = 5) -> float:
    """Return the mean seconds of ``work``, after one call that is not counted."""
    work()
    platform.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    platform.synchronize()
    return (time.perf_counter() - began) / times


def check_device(platform: NpuPlatform) -> None:
    """Check what the device is, its sums in float64, and that fp16 overflows to infinity."""
    name = torch.npu.get_device_name()
    peak = platform.peak_tflops(torch.bfloat16) or platform.peak_tflops(torch.float16)
    print_result(
        "device",
        peak is not None,
        f"{torch.npu.device_count()} x {name}, peak {peak} TFLOP/s in half precision,"
        f" bf16 {platform.has_bf16()}",
    )
    wide = torch.full((1000,), 1.0 + 2.0**-40, dtype=torch.float64, device=platform.device())
    print_result(
        "float64 sums",
        wide.square().sum().item() == (1000 * (1.0 + 2.0**-40) ** 2),
        f"{wide.square().sum().item():.17g}",
    )
    large = torch.full((4,), 60000.0, dtype=torch.float16, device=platform.device()) * 2
    print_result(
        "fp16 overflow is infinite",
        large.isinf().all().item(),
        f"{large[0].item()}: a device that saturates hides overflow from the loss scale",
    )


def check_copies(platform: NpuPlatform, num_bytes: int, least_gigabytes: float) -> None:
    """Measure copies between host and device and on the device."""
    device = torch.zeros(num_bytes, dtype=torch.uint8, device=platform.device())
    host, other = platform.host_buffer(device), torch.empty_like(device)
    for name, work in (
        ("copy host to device", lambda: device.copy_(host, non_blocking=True)),
        ("copy device to host", lambda: host.copy_(device, non_blocking=True)),
        ("copy on the device", lambda: other.copy_(device)),
    ):
        rate = num_bytes / seconds_of(platform, work) / 1e9
        print_result(
            name,
            rate >= least_gigabytes,
            f"{rate:.1f} GB/s of {num_bytes // MIB} MiB (at least {least_gigabytes:g})",
        )


def check_collectives(platform: NpuPlatform, num_bytes: int, least_gigabytes: float) -> None:
    """Measure and check collectives of all devices.

    Collective: all over the world group, several times each.
    """
    size, rank, place = dist.get_world_size(), dist.get_rank(), platform.device()
    count = num_bytes // 4 // size * size
    mine = torch.full((count,), float(rank + 1), device=place)
    gathered = torch.empty(count * size, device=place)
    part = torch.empty(count // size, device=place)
    total = size * (size + 1) / 2

    def exchange() -> None:
        """Send to the next rank.

        Collective: one message to the next rank, one from the previous one.
        """
        towards, back = (rank + 1) % size, (rank - 1) % size
        messages = [
            dist.P2POp(dist.isend, mine, towards),
            dist.P2POp(dist.irecv, gathered[:count], back),
        ]
        for work in dist.batch_isend_irecv(messages):
            work.wait()

    summed = mine.clone()
    dist.all_reduce(summed)
    checks = {
        "all-reduce": (
            lambda: dist.all_reduce(torch.empty_like(mine)),
            lambda: (summed == total).all(),
        ),
        "all-gather": (
            lambda: dist.all_gather_into_tensor(gathered, mine),
            lambda: gathered[::count].sum() == total,
        ),
        "reduce-scatter": (
            lambda: dist.reduce_scatter_tensor(part, mine),
            lambda: (part == total).all(),
        ),
    }
    if size > 1:
        checks["messages to the next rank"] = (
            exchange,
            lambda: (gathered[:count] == (rank - 1) % size + 1).all(),
        )
    for name, (work, is_right) in checks.items():
        rate = num_bytes / seconds_of(platform, work) / 1e9
        print_result(
            name,
            is_right().item() and rate >= least_gigabytes,
            f"{rate:.2f} GB/s of {num_bytes // MIB} MiB a device (at least "
            f"{least_gigabytes:g}), values {'right' if is_right().item() else 'WRONG'}",
        )
    exact = torch.tensor([2.0**40 + rank, 1 + 2.0**-40], dtype=torch.float64, device=place)
    dist.all_reduce(exact)
    wanted = [size * 2.0**40 + size * (size - 1) / 2, size * (1 + 2.0**-40)]
    print_result(
        "all-reduce of float64, by the workaround", exact.tolist() == wanted, f"{exact.tolist()}"
    )
    outputs = [torch.empty(count * size, device=place) for _ in range(2)]
    # Megatron's buckets coalesce their collectives like this.
    with dist._coalescing_manager(dist.group.WORLD, async_ops=True) as together:
        for output in outputs:
            dist.all_gather_into_tensor(output, mine)
    together.wait()
    print_result(
        "coalesced all-gathers",
        all((output[::count].sum() == total).item() for output in outputs),
        f"{len(outputs)} in one",
    )


def main() -> None:
    """Join the other processes, run the checks, and leave.

    Collective: the world group.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copy-gigabytes", type=float, required=True)
    parser.add_argument("--collective-gigabytes", type=float, required=True)
    parser.add_argument("--mebibytes", type=int, required=True)
    options = parser.parse_args()
    start_npu()
    platform = NpuPlatform()
    platform.select_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(platform.backend)
    check_device(platform)
    check_copies(platform, options.mebibytes * MIB, options.copy_gigabytes)
    check_collectives(platform, options.mebibytes * MIB, options.collective_gigabytes)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
