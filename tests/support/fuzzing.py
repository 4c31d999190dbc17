"""Damaged input for readers of bytes from outside.

Readers may raise only the project's own errors, in bounded time and memory.

    @fuzzed
    def test_reader(examples, tmp_path):
        path = tmp_path / "x.json"
        check_reader([b'{"a": 1}'], lambda data: read(written(path, data)), examples)

runs 50 examples in ``make test``, always the same, and 2,000 new ones in ``make test-faults``.
"""

import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck, strategies

from megatron_sorted.errors import SortedError

FEW, MANY = 50, 2000
MAX_SECONDS, MAX_BYTES, MAX_LETTERS = 20, 500 << 20, 2000
"""Bounds of one example; letters are those of a message."""
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\w.+-]+|[\[\]{}:,&*!|>#-]')
NUMBER = re.compile(rb"\d+(?:\.\d+)?")
INSERTED = [
    b"null",
    b"true",
    b"{}",
    b"[]",
    b'""',
    b'"x"',
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"-Infinity",
    b"1" * 5000,
    b"1" * 39,
    b"18446744073709551616",
    b"1e-4",
    b"0x10",
    b"2025-13-01",
    "²".encode(),
    b"!!int abc",
    b"&a [1]",
    b"*a",
    b"<<: *a",
    b"? ",
    b"- ",
    b"---\n",
    b"#",
    b"'",
    b'"',
    b",",
    b":",
    b"[",
    b"]",
    b"{",
    b"}",
    b"\\",
    b"\t",
    b"\n",
    b"\r",
    b"\r\n",
    b"\x00",
    b"\x1b[2J",
    b"\x85",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",
    b"\xe2\x80\xae",
    b"\\ud800",
    b"\\u0000",
    b"../../x",
    b"\x1f\x8b",
    b"{% for x in range(10**9) %}{% endfor %}",
    b"{{ x.__class__ }}",
    b"A" * 3000,
]
BORDERS = [-1, (1 << 31) - 1, 1 << 31, (1 << 63) - 1, 10**50]
NESTED = [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]"), (b"{a: ", b"}"), (b"- ", b"")]

fuzzed = pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.faults)])
"""Parametrizes a test by the number of ``examples``."""


def check_reader(
    valid: Sequence[bytes],
    read: Callable[[bytes], object],
    examples: int,
    errors: tuple[type[Exception], ...] = (SortedError,),
    one_line: bool = True,
) -> None:
    """Check that a reader refuses or reads damaged forms of valid inputs, in bounded memory.

    Args:
        valid: Intact inputs; each must be read without an error.
        read: The reader; it runs in a child process.
        examples: The number of damaged inputs to try.
        errors: The exceptions it may raise.
        one_line: Whether messages must be short, in one line and printable.
    """
    for data in valid:
        read(data)

    def body(data: bytes) -> None:
        signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
        try:
            read(data)
        except errors as error:
            message = str(error)
            assert not one_line or (message.isprintable() and len(message) <= MAX_LETTERS), message
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    test = hypothesis.given(damaged(valid))(body)
    test = hypothesis.settings(
        max_examples=examples,
        derandomize=examples <= FEW,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )(test)
    _in_child(test)


def written(path: Path, data: bytes) -> Path:
    """Write a file; return its path."""
    path.write_bytes(data)
    return path


@strategies.composite
def damaged(draw: strategies.DrawFn, valid: Sequence[bytes]) -> bytes:
    """Draw one of the valid inputs with one to four changes; rarely bytes of any kind."""
    data = draw(strategies.sampled_from(list(valid)))
    for _ in range(draw(strategies.integers(1, 4))):
        data = draw(strategies.sampled_from(CHANGES))(draw, data)
    return data


def _flip(draw: strategies.DrawFn, data: bytes) -> bytes:
    place = draw(strategies.integers(0, max(len(data) - 1, 0)))
    return data[:place] + bytes([draw(strategies.integers(0, 255))]) + data[place + 1 :]


def _cut(draw: strategies.DrawFn, data: bytes) -> bytes:
    begin, end = sorted(draw(strategies.integers(0, len(data))) for _ in range(2))
    return data[:begin] + data[end:] if draw(strategies.booleans()) else data[:end]


def _insert(draw: strategies.DrawFn, data: bytes) -> bytes:
    place = draw(strategies.integers(0, len(data)))
    return data[:place] + draw(strategies.sampled_from(INSERTED)) + data[place:]


def _any_bytes(draw: strategies.DrawFn, data: bytes) -> bytes:
    place = draw(strategies.integers(0, len(data)))
    return data[:place] + draw(strategies.binary(min_size=1, max_size=16)) + data[place:]


def _replace(draw: strategies.DrawFn, data: bytes) -> bytes:
    new = draw(strategies.sampled_from(INSERTED))
    return _instead(draw, data, TOKEN, new)


def _exchange(draw: strategies.DrawFn, data: bytes) -> bytes:
    tokens = TOKEN.findall(data)
    return _instead(draw, data, TOKEN, draw(strategies.sampled_from(tokens))) if tokens else data


def _number(draw: strategies.DrawFn, data: bytes) -> bytes:
    new = draw(strategies.integers(0, 1 << 70) | strategies.sampled_from(BORDERS))
    return _instead(draw, data, NUMBER, str(new).encode())


def _nest(draw: strategies.DrawFn, data: bytes) -> bytes:
    opening, closing = draw(strategies.sampled_from(NESTED))
    times = draw(strategies.sampled_from([3, 90, 300, 2000, 50_000]))
    inside = b"1" * draw(strategies.integers(0, 1))
    return _instead(draw, data, TOKEN, opening * times + inside + closing * times)


def _repeat(draw: strategies.DrawFn, data: bytes) -> bytes:
    begin, end = sorted(draw(strategies.integers(0, len(data))) for _ in range(2))
    return (
        data[:end]
        + data[begin:end]
        * min(draw(strategies.sampled_from([1, 3, 200])), 1 + 100_000 // max(end - begin, 1))
        + data[end:]
    )


def _instead(draw: strategies.DrawFn, data: bytes, pattern: re.Pattern[bytes], new: bytes) -> bytes:
    places = [match.span() for match in pattern.finditer(data)]
    if not places:
        return data + new
    begin, end = draw(strategies.sampled_from(places))
    return data[:begin] + new + data[end:]


CHANGES = [_flip, _cut, _insert, _any_bytes, _replace, _replace, _exchange, _number, _nest, _repeat]


def _in_child(test: Callable[[], None]) -> None:
    """Run a test in a child of bounded memory; fail with its traceback."""
    reads, writes = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reads)
        status = 1
        try:
            signal.signal(signal.SIGALRM, _too_long)
            most = _own_data_bytes() + MAX_BYTES
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
            test()
            status = 0
        except BaseException as error:
            notes = "\n".join(getattr(error, "__notes__", ()))
            report = "".join(traceback.format_exception(error)) + (
                "" if sys.version_info >= (3, 11) else notes
            )
            with open(writes, "w", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(
                    report if len(report) < 20_000 else f"{report[:4_000]}\n...\n{report[-16_000:]}"
                )
        finally:
            os._exit(status)
    os.close(writes)
    with open(reads, encoding="utf-8") as stream:
        report = stream.read()
    _, status = os.waitpid(child, 0)
    if status:
        pytest.fail(
            report or f"the child ended with status {os.waitstatus_to_exitcode(status)}",
            pytrace=False,
        )


def _too_long(*_: object) -> None:
    raise AssertionError(f"more than {MAX_SECONDS} s")


def _own_data_bytes() -> int:
    fields = Path("/proc/self/status").read_text(encoding="ascii").split()
    return 1024 * int(fields[fields.index("VmData:") + 1])
