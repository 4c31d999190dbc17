"""A process that converts one model, or reads and writes the same bytes plainly."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.benchmarks.bounds import PIECE_BYTES, forget_cached
from lab.benchmarks.jobs import do_job


def peak_bytes() -> int:
    """Return the largest resident memory of this process since the last `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def forget_peak() -> None:
    """Reset the peak to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def weight_files(directory: Path) -> list[Path]:
    """Return the files of a model that hold tensors."""
    return sorted(
        path for path in directory.rglob("*") if path.suffix in (".safetensors", ".distcp")
    )


def settle(directory: Path) -> None:
    """Flush earlier writes, and make the next read of the model come from the disk."""
    os.sync()
    forget_cached(weight_files(directory))


def copy_plainly(source: Path, target: Path) -> dict[str, Any]:
    """Copy every weight file to a new one and flush it; return seconds and bytes."""
    target.mkdir()
    settle(source)
    piece, num_bytes, start = bytearray(PIECE_BYTES), 0, time.perf_counter()
    for path in weight_files(source):
        with (
            open(path, "rb", buffering=0) as file,
            open(target / path.name, "wb", buffering=0) as copy,
        ):
            while got := file.readinto(piece):
                num_bytes += copy.write(memoryview(piece)[:got])
            os.fsync(copy.fileno())
    return {"seconds": time.perf_counter() - start, "bytes": num_bytes}


def convert(verb: str, source: Path, target: Path, verify: bool) -> dict[str, Any]:
    """Convert a model; return seconds and peaks, those of the verification by themselves."""
    from megatron_sorted.conversion.exporting import export_model
    from megatron_sorted.conversion.importing import import_model
    from megatron_sorted.conversion.open_model import open_model
    from megatron_sorted.conversion.origins import RequestedExits
    from megatron_sorted.conversion.writing import WriteOptions

    settle(source)
    numbers: dict[str, Any] = {"imported_bytes": peak_bytes()}
    start = time.perf_counter()

    def watch(title: str, _num_bytes: int) -> Callable[[int], None]:
        if title == "verifying":
            numbers.update(seconds=time.perf_counter() - start, peak_bytes=peak_bytes())
            forget_peak()
        return lambda _done: None

    model = open_model(source)
    writing = WriteOptions(verify=verify, watch=watch)
    written = (
        import_model(model, target, RequestedExits(), writing)
        if verb == "import"
        else export_model(model, target, writing, shard_bytes=10**9)
    )
    comparison = written.comparison
    if comparison is None:
        return {**numbers, "seconds": time.perf_counter() - start, "peak_bytes": peak_bytes()}
    return {
        **numbers,
        "verify_seconds": time.perf_counter() - start - numbers["seconds"],
        "verify_peak_bytes": peak_bytes(),
        "largest_difference": max(
            row.largest_difference / row.largest_logit for row in comparison.exits
        ),
    }


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Return what the job measures: "verb" is "plain", "import" or "export"."""
    source, target = Path(job["source"]), Path(job["target"])
    if job["verb"] == "plain":
        return copy_plainly(source, target)
    return convert(job["verb"], source, target, job["verify"])


if __name__ == "__main__":
    do_job(measure)
