"""A trial of the compiled library, run in a process of its own: ``python -m ... LIBRARY``.

It prints the instructions that the library uses, or "trial: " and what is wrong, with status 1.
"""

import ctypes
import sys
from pathlib import Path

from megatron_sorted.decoding.native.compiler import NativeError
from megatron_sorted.decoding.native.library import KINDS, CMatrix, load_library

OUTPUTS, INPUTS, ROWS, THREADS = 70, 150, 3, 2
TOLERANCE = 1e-3


def numbers(count: int, seed: int) -> list[int]:
    """Return as many of -1, 0 and 1, which every kind of weights holds exactly."""
    values, state = [], seed
    for _ in range(count):
        state = (1103515245 * state + 12345) % 2**31
        values.append((state >> 16) % 3 - 1)
    return values


def product(library: ctypes.CDLL, kind: int, weights: list[int], inputs: list[int]) -> list[float]:
    """Return the product of a matrix of this kind with some rows, computed by the library."""
    size = OUTPUTS, INPUTS
    packed = ctypes.create_string_buffer(library.native_packed_bytes(kind, *size) + 64)
    scales = (ctypes.c_float * (library.native_num_scales(kind, *size) + 16))()
    source = (ctypes.c_float * len(weights))(*weights)
    library.native_pack(
        THREADS,
        kind,
        ctypes.addressof(source),
        *size,
        ctypes.addressof(packed),
        ctypes.addressof(scales),
    )
    matrix = CMatrix(kind, *size, 0, ctypes.addressof(packed), ctypes.addressof(scales), None)
    rows = (ctypes.c_float * len(inputs))(*inputs)
    result = (ctypes.c_float * (ROWS * OUTPUTS))()
    library.native_multiply(
        THREADS, ctypes.byref(matrix), ROWS, ctypes.addressof(rows), ctypes.addressof(result)
    )
    return list(result)


def main(path: str) -> int:
    """Try a library; return the exit status."""
    weights, inputs = numbers(OUTPUTS * INPUTS, 1), numbers(ROWS * INPUTS, 2)
    expected = [
        sum(weights[output * INPUTS + at] * inputs[row * INPUTS + at] for at in range(INPUTS))
        for row in range(ROWS)
        for output in range(OUTPUTS)
    ]
    try:
        library = load_library(Path(path))
        for name, kind in KINDS.items():
            found = product(library, kind, weights, inputs)
            worst = max(abs(a - b) for a, b in zip(found, expected, strict=True))
            if not worst < TOLERANCE:
                raise NativeError(f"its products in {name} are wrong by {worst:.3g}")
    except NativeError as error:
        print(f"trial: {error}")
        return 1
    print(library.native_instructions().decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
