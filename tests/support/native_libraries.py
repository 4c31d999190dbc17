"""The native source compiled for every set of instructions that this CPU has, once per process."""

import atexit
import ctypes
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from megatron_sorted.decoding.native.compiler import FLAGS, MAIN, SOURCE, NativeError, find_compiler
from megatron_sorted.decoding.native.library import BFLOAT16, FLOAT32, INT8, CMatrix, load_library

GROUP = 64
"""Number of inputs that share a scale in int8."""
WANTED = {
    "x86-64": (set(), "portable"),
    "haswell": ({"avx2", "fma", "bmi2", "movbe"}, "AVX2"),
    "skylake-avx512": ({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}, "AVX512"),
    "cascadelake": ({"avx512bw", "avx512vl", "avx512_vnni"}, "AVX512 with VNNI"),
}
"""Value of -march -> flags of /proc/cpuinfo that it needs, and the instructions that it uses."""


def cpu_flags() -> set[str]:
    """Return the names of this CPU's instructions, as Linux gives them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def targets() -> list[str]:
    """Return the values of -march whose code runs on this CPU."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["native"]
    return ["native", *(name for name, (needed, _) in WANTED.items() if needed <= cpu_flags())]


@cache
def folder() -> Path:
    """Return a folder for what this process compiles; it is deleted at the end."""
    made = Path(tempfile.mkdtemp(prefix="native-tests-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def compile_program(sources: list[Path], target: Path, *flags: str, source: Path = SOURCE) -> Path:
    """Compile a program or library with the flags of the package, and these last ones.

    Args:
        sources: Files to compile.
        target: Program or library.
        *flags: More flags.
        source: Folder of the native source that they include.
    """
    try:
        compiler = find_compiler()
    except NativeError as error:
        pytest.skip(str(error))
    known = [flag for flag in FLAGS if flag not in ("-shared", "-O3")]
    command = [*compiler, *known, *flags, f"-I{source}", *map(str, sources)]
    done = subprocess.run(
        [*command, "-o", str(target)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return target


@cache
def library_for(target: str) -> ctypes.CDLL:
    """Return the library compiled for a value of -march; -O1 is compiled faster."""
    flag = "-mcpu" if platform.machine() in ("arm64", "aarch64") else "-march"
    path = folder() / f"{target}.so"
    compile_program([SOURCE / MAIN], path, "-shared", "-O1", f"{flag}={target}")
    return load_library(path)


class PackedMatrix:
    """A matrix packed by a library, in memory that ends where its last number ends."""

    def __init__(self, library, kind: int, weights: np.ndarray, bias=None, threads: int = 1):
        self.library, self.shape, self.bias = library, weights.shape, bias
        weights = np.ascontiguousarray(weights, dtype=np.float32)
        self.packed = np.zeros(library.native_packed_bytes(kind, *weights.shape), np.uint8)
        self.scales = np.zeros(library.native_num_scales(kind, *weights.shape), np.float32)
        library.native_pack(
            threads,
            kind,
            weights.ctypes.data,
            *weights.shape,
            self.packed.ctypes.data,
            self.scales.ctypes.data,
        )
        self.c = CMatrix(
            kind,
            *weights.shape,
            0,
            self.packed.ctypes.data,
            self.scales.ctypes.data,
            None if bias is None else bias.ctypes.data,
        )

    def __call__(self, rows: np.ndarray, threads: int = 1) -> np.ndarray:
        """Return the products with these rows; memory beside them is checked."""
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        margin, count = 64, len(rows) * self.shape[0]
        got = np.full(count + 2 * margin, 12345.0, np.float32)
        self.library.native_multiply(
            threads, ctypes.byref(self.c), len(rows), rows.ctypes.data, got[margin:].ctypes.data
        )
        beside = np.concatenate([got[:margin], got[margin + count :]])
        assert (beside == 12345.0).all(), "it wrote before the first or behind the last output"
        return got[margin : margin + count].reshape(len(rows), self.shape[0])


def rounded_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return float32 numbers rounded to bfloat16, ties to even, by whole-number arithmetic."""
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.int64)
    low, kept = bits & 0xFFFF, bits >> 16
    up = (low > 0x8000) | ((low == 0x8000) & (kept & 1 == 1))
    return ((kept + up) << 16).astype(np.uint32).view(np.float32)


def quantized(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whole numbers [r, groups, GROUP] and scales [r, groups] of rows of float32."""
    rows, size = values.shape
    padded = np.zeros((rows, -(-size // GROUP) * GROUP), np.float32)
    padded[:, :size] = values
    groups = padded.reshape(rows, -1, GROUP)
    most = np.abs(groups).max(axis=2)
    used = most >= np.float32(1e-30)
    safe = np.where(used, most, np.float32(1))
    scales = np.where(used, safe / np.float32(127), np.float32(0))
    inverse = np.where(used, np.float32(127) / safe, np.float32(0))
    return np.rint(groups * inverse[:, :, None]).astype(np.int64), scales


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray, fused: bool) -> np.ndarray:
    """Return a * b + c in float32, rounded once (through float64) or two times."""
    if fused:
        return (a.astype(np.float64) * b.astype(np.float64) + c).astype(np.float32)
    return a * b + c


def expected_product(matrix: PackedMatrix, weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return W x + b computed term by term in the order of the library, [n, outputs].

    That is the order of the inputs; Intel's instruction for bfloat16 takes the second input of each
    pair first.
    """
    kind, bias = matrix.c.kind, matrix.bias
    instructions = matrix.library.native_instructions().decode()
    fused = instructions != "portable"
    sums = np.zeros((len(rows), len(weights)), np.float32)
    if kind == INT8:
        bytes_w, scales_w = quantized(weights)
        bytes_x, scales_x = quantized(rows)
        for group in range(scales_w.shape[1]):
            exact = bytes_x[:, group] @ bytes_w[:, group].T
            scale = scales_w[None, :, group] * scales_x[:, group, None]
            sums = multiply_add(exact.astype(np.float32), scale, sums, fused)
    else:
        if kind != FLOAT32:
            weights, rows = rounded_to_bfloat16(weights), rounded_to_bfloat16(rows)
        order = list(range(weights.shape[1]))
        if kind == BFLOAT16 and "BF16" in instructions:
            order = sorted(order, key=lambda k: (k // 2, -k))
        for k in order:
            sums = multiply_add(weights[None, :, k], rows[:, k, None], sums, fused)
    return sums if bias is None else sums + bias
