"""The native source under sanitizers, its structures, its threads, forks and lack of memory."""

import ctypes
import shutil
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from megatron_sorted.decoding.native import library as structures
from megatron_sorted.decoding.native.compiler import SOURCE
from megatron_sorted.decoding.native.library import FLOAT32, INT8, CMatrix
from megatron_sorted.errors import MemoryExhaustedError
from megatron_sorted.installation import ROOT
from tests.support.native_libraries import (
    PackedMatrix,
    compile_program,
    folder,
    library_for,
    targets,
)

PROGRAM = Path(__file__).parents[1] / "support" / "native_program.cpp"
BOTH = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run a program, where possible at the addresses that older sanitizers expect."""
    command = [str(program), *arguments]
    fixed = ["setarch", "-R"]
    if shutil.which("setarch") and not subprocess.run([*fixed, "true"], check=False).returncode:
        command = [*fixed, *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@cache
def sanitized(target: str) -> Path:
    """Return the program that checks addresses and undefined behaviour."""
    return compile_program([PROGRAM], folder() / f"checked-{target}", *BOTH, f"-march={target}")


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, marks=[pytest.mark.long] if target != "native" else [])
        for target in targets()
        if target != "cascadelake"
    ],
)
def test_no_address_beside_memory_and_no_undefined_behaviour(target):
    for threads in ("1", "2", "3"):
        done = run(sanitized(target), threads)
        assert done.returncode == 0 and "done" in done.stdout, done.stderr[:3000]


@pytest.mark.parametrize(
    "file, old, new, got",
    [
        ("products.h", "if (count == BLOCK) {", "if (count > 0) {", "heap-buffer-overflow"),
        ("packing.h", "is_real && k < m.inputs", "is_real", "heap-buffer-overflow"),
        (
            "attention.h",
            "{0, slot + 1, 0, nodes}",
            "{0, slot + 2, 0, nodes}",
            "heap-buffer-overflow",
        ),
        ("vectors.h", "static_cast<uint32_t>(x) << 16", "int32_t{x} << (16 + x % 32)", "shift"),
    ],
)
def test_a_wrong_access_is_reported(file, old, new, got, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    text = (source / file).read_text()
    assert text.count(old) == 1
    (source / file).write_text(text.replace(old, new))
    made = compile_program([PROGRAM], tmp_path / "wrong", *BOTH, source=source)
    done = run(made, "1")
    assert done.returncode != 0 and got in done.stderr, done.stderr[:3000]


def test_threads_do_not_race():
    made = compile_program([PROGRAM], folder() / "raced", "-fsanitize=thread", "-g", "-O1")
    done = run(made, "3")
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not know this kernel's addresses")
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[:3000]


def test_structures_lie_in_memory_as_python_sees_them():
    made = compile_program([PROGRAM], folder() / "layout")
    expected = {}
    for name in ("Matrix", "Layer", "Part", "Cache", "Segment", "Text", "Places", "Readout"):
        kind = getattr(structures, f"C{name}")
        expected[name, "-"] = (ctypes.sizeof(kind), 0)
        for field, *_ in kind._fields_:
            at = getattr(kind, field)
            expected[name, field] = (at.offset, at.size)
    lines = [line.split() for line in run(made, "layout").stdout.splitlines()]
    assert {(line[0], line[1]): (int(line[2]), int(line[3])) for line in lines} == expected


def test_lines_are_short_and_files_small():
    for path in SOURCE.iterdir():
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 250, path
        assert max(map(len, lines)) <= 100, path


@pytest.mark.parametrize("kind", [FLOAT32, INT8])
def test_too_little_memory_is_an_error_of_its_own(kind):
    library = library_for("native")
    matrix = CMatrix(kind, 1, 1 << 20, 0, None, None, None)
    # more bytes than a process can address; nothing is read
    with pytest.raises(MemoryExhaustedError, match=r"free memory.*--native off"):
        library.native_multiply(2, ctypes.byref(matrix), 2**31 - 1, None, None)
    weights = np.ones((70, 65), np.float32)
    assert (PackedMatrix(library, kind, weights)(weights[:3], 2) > 60).all(), "it works on"


def matrix_and_rows() -> tuple[PackedMatrix, np.ndarray, np.ndarray]:
    """Return a matrix, rows, and their products."""
    generator = np.random.default_rng(0)
    weights, rows = (generator.standard_normal((n, 172)).astype(np.float32) for n in (700, 9))
    matrix = PackedMatrix(library_for("native"), INT8, weights)
    return matrix, rows, matrix(rows)


def test_calls_of_several_threads_with_different_pools():
    matrix, rows, expected = matrix_and_rows()
    wrong = []

    def work(number: int) -> None:
        for step in range(60):
            if not np.array_equal(matrix(rows, 1 + (number + step // 20) % 3), expected):
                wrong.append((number, step))

    started = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert not wrong


def test_idle_threads_sleep():
    matrix, rows, _ = matrix_and_rows()
    matrix(rows, 4)
    time.sleep(0.05)
    start = time.process_time()  # of all threads
    time.sleep(0.4)
    assert time.process_time() - start < 0.1


FORKING = """\
import os, sys, threading
from tests.unit.test_native_sources import matrix_and_rows
matrix, rows, expected = matrix_and_rows()
assert (matrix(rows, 3) == expected).all()
stopping = threading.Event()
def busy():
    while not stopping.is_set():
        assert (matrix(rows, 3) == expected).all()
threading.Thread(target=busy, daemon=True).start()
for _ in range(30):
    child = os.fork()
    if child == 0:
        ok = all((matrix(rows, threads) == expected).all() for threads in (1, 3, 2))
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stopping.set()
assert (matrix(rows, 2) == expected).all()
print("done")
"""


def test_a_fork_has_threads_of_its_own():
    done = subprocess.run(
        [sys.executable, "-c", FORKING],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr[-3000:]


LIMITED = """\
import resource
from tests.unit.test_native_sources import matrix_and_rows
matrix, rows, expected = matrix_and_rows()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (200 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
assert (matrix(rows, 64) == expected).all()
print("done")
"""


def test_fewer_threads_than_requested_do_the_same_work():
    """Stacks of 63 threads do not fit into the address space that is left."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr[-3000:]
