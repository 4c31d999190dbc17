"""A process of its own that converts one model, or reads and writes the same bytes plainly, and writes what it took as JSON."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.benchmarks.bounds import PIECE_BYTES, forget_cached


def peak_bytes() -> int:
    """Return the largest resident memory of this process since the last `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def forget_peak() -> None:
    """Make the peak begin anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def weight_files(directory: Path) -> list[Path]:
    """Return the files of a model that hold tensors."""
    return sorted(
        path for path in directory.rglob("*") if path.suffix in (".safetensors", ".distcp")
    )


def settle(directory: Path) -> None:
    """Write out what earlier work left to be written, and makes the next read of the model come from the disk."""
    os.sync()
    forget_cached(weight_files(directory))


def copy_plainly(source: Path, target: Path) -> dict[str, Any]:
    """Return seconds and bytes of reading every weight file and writing its bytes to a new one, flushed."""
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
    """Return seconds and peaks of a conversion, and of its verification apart."""
    from megatron_sorted.conversion.exporting import export_model
    from megatron_sorted.conversion.importing import import_model
    from megatron_sorted.conversion.open_model import open_model
    from megatron_sorted.conversion.origins import Exits
    from megatron_sorted.conversion.writing import Writing

    settle(source)
    found: dict[str, Any] = {"imported_bytes": peak_bytes()}
    start = time.perf_counter()

    def watch(title: str, _num_bytes: int) -> Callable[[int], None]:
        if title == "verifying":
            found.update(seconds=time.perf_counter() - start, peak_bytes=peak_bytes())
            forget_peak()
        return lambda _done: None

    model = open_model(source)
    writing = Writing(verify=verify, watch=watch)
    written = (
        import_model(model, target, Exits(), writing)
        if verb == "import"
        else export_model(model, target, writing, shard_bytes=10**9)
    )
    comparison = written.comparison
    if comparison is None:
        return {**found, "seconds": time.perf_counter() - start, "peak_bytes": peak_bytes()}
    return {
        **found,
        "verify_seconds": time.perf_counter() - start - found["seconds"],
        "verify_peak_bytes": peak_bytes(),
        "largest_difference": max(
            row.largest_difference / row.largest_logit for row in comparison.exits
        ),
    }


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    places = Path(job["source"]), Path(job["target"])
    result = (
        copy_plainly(*places)
        if job["verb"] == "plain"
        else convert(job["verb"], *places, job["verify"])
    )
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
