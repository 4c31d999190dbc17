"""Measure the products of the compiled library: bytes read, arithmetic, and costs of n tokens.

    python -m lab.native_speed                             this CPU's best instructions, one thread
    python -m lab.native_speed --threads 2 --march native haswell x86-64
    python -m lab.native_speed --quick                     tries the measurement, no useful numbers

The matrices are those of a LLaMA of 52 million parameters, more than caches hold: 1 to 16 tokens
are limited by memory, 512 tokens by arithmetic. Kinds take turns in every round; figures are
medians. The memory's own speed, a sum over as many bytes, stands beside them.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_sorted.decoding.native.compiler import FLAGS, MAIN, SOURCE, find_compiler
from megatron_sorted.decoding.native.library import KINDS, CMatrix, load_library
from megatron_sorted.errors import PlatformError
from megatron_sorted.reporting.markdown import table

LAYERS, HIDDEN, WIDE, VOCABULARY = 10, 640, 1728, 4096
LAYER_SHAPES = ((3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (2 * WIDE, HIDDEN), (HIDDEN, WIDE))
FEW, PROMPT = range(1, 17), 512
SHOWN = (2, 3, 4, 5, 6, 8, 12, 16)


@dataclass(frozen=True)
class Packed:
    """The matrices of a model in one kind of weights.

    Attributes:
        library: The compiled library.
        matrices: Matrices as its structures.
        held: Tensors that hold their numbers.
        num_weights: Number of weights.
    """

    library: ctypes.CDLL
    matrices: list[CMatrix]
    held: list[torch.Tensor]
    num_weights: int

    @property
    def num_bytes(self) -> int:
        """Return the size of what a token reads."""
        return sum(tensor.nbytes for tensor in self.held)

    def seconds(self, num_tokens: int, threads: int) -> float:
        """Return the time of all products of this number of tokens."""
        inputs = torch.ones(num_tokens, max(matrix.inputs for matrix in self.matrices))
        outputs = torch.empty(num_tokens, max(matrix.outputs for matrix in self.matrices))
        start = time.perf_counter()
        for matrix in self.matrices:
            self.library.native_multiply(
                threads, ctypes.byref(matrix), num_tokens, inputs.data_ptr(), outputs.data_ptr()
            )
        return time.perf_counter() - start


def pack(library: ctypes.CDLL, kind: str, quick: bool) -> Packed:
    """Pack random matrices of the shapes of a model."""
    shapes = list(LAYER_SHAPES) * (1 if quick else LAYERS) + [(VOCABULARY, HIDDEN)] * (not quick)
    matrices, held, number = [], [], KINDS[kind]
    for shape in shapes:
        weights = torch.randn(shape)
        packed = torch.empty(library.native_packed_bytes(number, *shape), dtype=torch.uint8)
        scales = torch.empty(library.native_num_scales(number, *shape))
        library.native_pack(
            1, number, weights.data_ptr(), *shape, packed.data_ptr(), scales.data_ptr()
        )
        held += [packed, scales]
        matrices.append(
            CMatrix(number, *shape, 0, packed.data_ptr(), scales.data_ptr() or None, None)
        )
    return Packed(library, matrices, held, sum(rows * columns for rows, columns in shapes))


def compile_for(march: str, folder: Path) -> ctypes.CDLL:
    """Compile the library for a value of -march (on ARM: -mcpu).

    Raises:
        PlatformError: The compiler does not know it.
    """
    target, flag = folder / f"{march}.so", f"-march={march}"
    command = [*find_compiler(), *FLAGS, flag, str(SOURCE / MAIN), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PlatformError(f"{flag}: the compiler failed. Choose another.\n{done.stderr[:500]}")
    return load_library(target)


def memory_speed(num_bytes: int) -> float:
    """Return the bytes a second that a sum over as many bytes reads."""
    numbers = torch.ones(num_bytes // 4)
    start = time.perf_counter()
    numbers.sum()
    return num_bytes / (time.perf_counter() - start)


def measure(march: str, folder: Path, values: argparse.Namespace) -> list[list[str]]:
    """Return a row of the table for each kind of weights."""
    library = compile_for(march, folder)
    counts = [1, 2, 5, 8] if values.quick else [*FEW, PROMPT]
    kinds = {kind: pack(library, kind, values.quick) for kind in KINDS}
    times = {(kind, n): [] for kind in kinds for n in counts}
    speeds = []
    for round_number in range(values.rounds + 1):
        for kind, packed in kinds.items():
            for n in counts:
                seconds = packed.seconds(n, values.threads)
                if round_number:  # the first one warms up
                    times[kind, n].append(seconds)
        speeds.append(memory_speed(kinds["float32"].num_bytes))
    rows = []
    for kind, packed in kinds.items():
        of = {n: statistics.median(times[kind, n]) for n in counts}
        largest = max(counts)
        operations = 2 * packed.num_weights * largest
        rows.append(
            [
                library.native_instructions().decode(),
                kind,
                f"{1e3 * of[1]:.2f}",
                f"{packed.num_bytes / of[1] / 1e9:.1f}",
                f"{statistics.median(speeds) / 1e9:.1f}",
                " / ".join(f"{of[n] / of[1]:.2f}" for n in SHOWN if n in of),
                f"{operations / of[largest] / 1e9:.0f}",
            ]
        )
    return rows


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--march", nargs="+", default=["native"], help="CPUs to compile for")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="few, small matrices")
    values = parser.parse_args()
    torch.set_num_threads(values.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for march in values.march:
            rows += measure(march, Path(folder), values)
    shown = [n for n in SHOWN if not values.quick or n in (2, 5, 8)]
    head = [
        "instructions", "weights", "ms, 1 token", "GB/s", "memory, GB/s",
        f"cost of {' / '.join(map(str, shown))} tokens",
        f"GFLOP/s, {8 if values.quick else PROMPT} tokens",
    ]  # fmt: skip
    print("\n".join(table(head, rows)))


if __name__ == "__main__":
    run_main(main, "Nothing was written.")
