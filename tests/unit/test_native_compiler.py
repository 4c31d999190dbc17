"""The compiler of the library: which one is taken, what it may do wrong, which CPU it is for."""

import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_sorted.decoding.native import compiler, cpu
from megatron_sorted.decoding.native.compiler import (
    NativeError,
    TimeLimitError,
    compiler_version,
    find_compiler,
    instructions_for,
    instructions_of,
    own_targets,
    run_program,
    targets_of,
)
from megatron_sorted.decoding.native.library import load_library
from megatron_sorted.decoding.native.library_cache import built_library
from tests.support.stand_in_compiler import COPY, session_library, stand_in


def program(folder: Path, name: str) -> Path:
    """Write a program that does nothing."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_the_first_known_compiler_on_the_path(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    program(one, "clang++")
    environment = {"PATH": f"{one}:{two}"}
    assert find_compiler(environment) == (str(one / "clang++"),)
    program(two, "g++")
    assert find_compiler(environment) == (str(two / "g++"),)
    (two / "c++").symlink_to("nothing")  # as a package that was removed leaves it
    assert find_compiler(environment) == (str(two / "g++"),)
    with pytest.raises(NativeError, match=r"no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\)"):
        find_compiler({"PATH": str(tmp_path)})


def test_a_named_compiler(tmp_path):
    odd = str(program(tmp_path / "a folder", "my g++"))
    cache = str(program(tmp_path, "ccache"))
    path = {"PATH": str(tmp_path)}
    assert find_compiler({"CXX": odd, **path}) == (odd,)
    assert find_compiler({"CXX": "ccache g++ -m64", **path}) == (cache, "g++", "-m64")
    assert find_compiler({"CXX": f"'{odd}' -m64", **path}) == (odd, "-m64")
    program(tmp_path, "g++")
    assert find_compiler({"CXX": " ", **path}) == (str(tmp_path / "g++"),)
    for named, reason in (("'gxx", "is no command: No closing"), ("icpx -g", "names no program")):
        with pytest.raises(NativeError, match=f"CXX={named} {reason}"):
            find_compiler({"CXX": named, **path})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("exit 1", "ended with status 1 and printed nothing"),
        ("echo hello; echo 'x.h:1: error: no header' >&2; exit 1", "x.h:1: error: no header"),
        ("printf 'odd \\377\\n'; exit 3", "odd \ufffd"),
        ("kill -SEGV $$", "crashed with SIGSEGV"),
        ("exit 0", "wrote no library"),
    ],
)
def test_a_broken_compiler(tmp_path, body, reason):
    tmp_path.chmod(0o700)
    machine, printed = stand_in(tmp_path, body), []
    with pytest.raises(NativeError) as refused, built_library(printed.append, machine.environment):
        pass
    assert str(machine.program) in str(refused.value) and str(refused.value).endswith(reason)
    assert "".join(printed).endswith("it failed\n") and "".join(printed).count("\n") == 1
    assert [file.name for file in machine.cache.iterdir()] == ["lock"]


def test_a_compiler_that_is_no_program(tmp_path):
    tmp_path.chmod(0o700)
    machine = stand_in(tmp_path)
    machine.program.write_bytes(b"\x7fELF and nothing else")
    with (
        pytest.raises(NativeError, match=r"does not start \(Exec format error\)"),
        built_library(lambda text: None, machine.environment),
    ):
        pass


def test_a_compiler_that_hangs_is_ended_with_its_children_and_not_started_again(
    tmp_path, monkeypatch
):
    tmp_path.chmod(0o700)
    pid = tmp_path / "pid"
    machine = stand_in(tmp_path, f'sleep 300 & echo $! > "{pid}"; wait')
    monkeypatch.setattr(compiler, "COMPILE_SECONDS", 1.0)
    start = time.monotonic()
    for reason in ("cxx did not end within 1 s$", "cxx did not end within 1 s; delete .*refused"):
        with (
            pytest.raises(NativeError, match=reason),
            built_library(lambda text: None, machine.environment),
        ):
            pass
    assert time.monotonic() - start < 60 and len(machine.runs) == 1
    state = Path(f"/proc/{pid.read_text().strip()}/status")
    until = time.monotonic() + 10  # a process that was sent SIGKILL needs a moment of a core to end
    with suppress(FileNotFoundError, ProcessLookupError):
        while "\nState:\tZ" not in state.read_text():
            assert time.monotonic() < until
            time.sleep(0.01)


def test_a_program_is_interrupted_with_its_children(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    ended = []
    monkeypatch.setattr(subprocess.Popen, "communicate", interrupt)
    monkeypatch.setattr(
        compiler.os, "killpg", lambda number, sent, kill=os.killpg: ended.append(kill(number, sent))
    )
    with pytest.raises(KeyboardInterrupt):
        run_program(["sleep", "300"], 300)
    assert len(ended) == 1


def test_a_compiler_that_does_not_know_the_cpu_compiles_for_all(tmp_path):
    tmp_path.chmod(0o700)
    unknown = 'case "$*" in *=native*) echo "error: unknown value native"; exit 1; esac\n'
    machine = stand_in(tmp_path, unknown + COPY)
    with built_library(lambda text: None, machine.environment) as path:
        load_library(path)
    assert len(machine.runs) == len(own_targets())
    assert all("native" in run.split(" -o ")[0].split("pass.cpp")[0] for run in machine.runs[:-1])
    assert "=native" not in machine.runs[-1]


def test_a_compiler_that_fails_for_every_target_gives_the_first_reason(tmp_path):
    tmp_path.chmod(0o700)
    machine = stand_in(tmp_path, 'echo "error: run $(wc -l < $0.log)"; exit 1')
    with (
        pytest.raises(NativeError, match=r"error: run 1$"),
        built_library(lambda text: None, machine.environment),
    ):
        pass


def test_targets():
    assert targets_of("x86_64") == (("-march=native",), ())
    assert targets_of("arm64")[0] == targets_of("aarch64")[0] == ("-mcpu=native",)
    assert all(targets_of(name)[-1] == () for name in ("x86_64", "aarch64", "riscv64"))


def test_the_time_limit_of_a_question(tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "ASK_SECONDS", 0.3)
    with pytest.raises(TimeLimitError):
        compiler_version((str(stand_in(tmp_path, "sleep 60").program),))


def test_versions(tmp_path):
    assert compiler_version((str(stand_in(tmp_path, "echo; echo 'cxx 1.2 '; echo").program),)) == (
        "cxx 1.2"
    )
    for body in ("exit 0", "exit 2"):
        with pytest.raises(NativeError, match="cxx failed: ended with status"):
            compiler_version((str(stand_in(tmp_path, body).program),))


def test_instructions_are_those_of_the_compiled_library():
    used = load_library(session_library()).native_instructions().decode()
    assert instructions_for(find_compiler(), own_targets()) == used


AVX512, AVX2 = ("__AVX512F__", "__AVX512BW__"), ("__AVX2__", "__FMA__")


@pytest.mark.parametrize(
    ("macros", "name"),
    [
        ({*AVX512, "__AVX512VNNI__", "__AVX512BF16__"}, "AVX512 with VNNI and BF16"),
        ({*AVX512, "__AVX512VNNI__", *AVX2}, "AVX512 with VNNI"),
        ({*AVX512, "__AVX512BF16__"}, "AVX512"),
        ({*AVX512, *AVX2}, "AVX512"),
        ({"__AVX512F__", "__AVX512VNNI__", *AVX2}, "AVX2"),
        ({"__AVX512BW__", "__SSE2__"}, "portable"),
        ({*AVX2, "__SSE2__"}, "AVX2"),
        ({"__AVX2__", "__SSE2__"}, "portable"),
        ({"__FMA__", "__SSE2__"}, "portable"),
        ({"__aarch64__", "__ARM_NEON"}, "NEON"),
        ({"__ARM_NEON"}, "portable"),
        ({"__SSE2__"}, "portable"),
    ],
)
def test_instructions_by_macros(macros, name):
    assert instructions_of(macros) == name


def test_instructions_where_the_cpu_is_unknown_to_the_compiler(tmp_path):
    body = (
        'case "$*" in *=native*) exit 1; esac\necho "#define __aarch64__ 1"; echo "#define __x 2"'
    )
    command = (str(stand_in(tmp_path, body).program),)
    assert instructions_for(command, targets_of("aarch64")) == "NEON"
    with pytest.raises(NativeError, match="printed nothing"):
        instructions_for((str(stand_in(tmp_path, "exit 1").program),), targets_of("x86_64"))


def test_the_name_of_a_cpu_tells_unlike_ones_apart(tmp_path):
    def name(text: str | None) -> str:
        (tmp_path / "proc").mkdir(exist_ok=True)
        file = tmp_path / "proc" / "cpuinfo"
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        return cpu.cpu_name(tmp_path)

    core = "processor\t: 0\nmodel name\t: A\ncpu MHz\t: 2000\nflags\t\t: fpu avx2\n"
    first = name(core)
    assert first == name(core.replace("2000", "900")) == name(core + "\nmodel name\t: B\n")
    others = [core.replace("avx2", "avx512f"), core.replace(": A", ": B"), "CPU part\t: 0xd0c\n"]
    assert len({first, *map(name, others), name(None)}) == 5
    assert cpu.cpu_name() == cpu.cpu_name()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("maxsize", 2**31 - 1, "32 bits"), ("byteorder", "big", "highest byte first")],
)
def test_an_unknown_architecture(tmp_path, monkeypatch, name, value, reason):
    monkeypatch.setattr(cpu.sys, name, value)
    with (
        pytest.raises(NativeError, match=reason),
        built_library(lambda text: None, stand_in(tmp_path).environment),
    ):
        pass


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "10000 100000"}, 1),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "damaged"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "6400000 100000"}, 8),
        (
            {
                "proc/self/cgroup": "5:memory:/m\n4:cpu,cpuacct:/d\n0::/\n",
                "sys/fs/cgroup/cpu/d/cpu.cfs_quota_us": "500000",
                "sys/fs/cgroup/cpu/d/cpu.cfs_period_us": "100000",
            },
            5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/outside\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            8,
        ),
    ],
)
def test_usable_cores(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda process: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu.usable_cores(tmp_path) == cores
