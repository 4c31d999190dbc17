"""The cache of compiled libraries: what is loaded, what is built again, what is refused."""

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_sorted.decoding.native import compiler, library_cache, private_folder
from megatron_sorted.decoding.native.compiler import CacheError, NativeError
from megatron_sorted.decoding.native.library import VERSION, load_library
from megatron_sorted.decoding.native.library_cache import built_library, is_intact, plan_build
from megatron_sorted.decoding.native.private_folder import cache_folder
from megatron_sorted.installation import own_module
from tests.support.stand_in_compiler import COPY, session_library, small_library, stand_in

WITHOUT_PRODUCTS = f"""
int native_version() {{ return {VERSION}; }}
const char *native_instructions() {{ return "none"; }}
unsigned long native_packed_bytes(int, int, int) {{ return 64; }}
unsigned long native_num_scales(int, int, int) {{ return 0; }}
int native_pack() {{ return 0; }}
int native_multiply() {{ return 0; }}
int native_run() {{ return 0; }}
int native_logits() {{ return 0; }}
"""


@pytest.fixture(autouse=True)
def umask(tmp_path):
    """Make the folder above the homes the user's alone, whatever pytest's own is."""
    tmp_path.chmod(0o700)
    before = os.umask(0o022)
    yield
    os.umask(before)


def opened(machine, targets=None) -> tuple[Path, str]:
    """Return the path of the library as a start gets it, and what was printed."""
    printed = []
    with built_library(printed.append, machine.environment, targets) as path:
        assert path.read_bytes() == session_library().read_bytes()
    return path, "".join(printed)


def kept(machine) -> Path:
    """Return the only library in the cache."""
    [library] = machine.cache.glob("*.so")
    return library


def test_the_first_start_compiles_with_one_line_and_later_ones_run_nothing(tmp_path, monkeypatch):
    machine = stand_in(tmp_path)
    path, printed = opened(machine)
    assert path == kept(machine) and is_intact(path)
    assert printed.startswith("compiling the decoder for this CPU, once ... ")
    assert printed.endswith(")\n") and printed.count("\n") == 1 and " s (" in printed
    assert stat.S_IMODE(machine.cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(machine.cache.parent.stat().st_mode) == 0o700
    assert {file.suffix for file in machine.cache.iterdir()} == {".so", ".sha256", ""}
    monkeypatch.setattr(compiler.subprocess, "Popen", None)
    assert opened(machine) == (path, "")
    assert len(machine.runs) == 1
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_name_depends_on_source_flags_compiler_and_cpu(tmp_path, monkeypatch):
    machine = stand_in(tmp_path)
    names = [plan_build(machine.environment).name, plan_build(machine.environment, ((),)).name]
    with monkeypatch.context() as patch:
        patch.setattr(library_cache, "cpu_name", lambda: "another")
        names.append(plan_build(machine.environment).name)
    with monkeypatch.context() as patch:
        patch.setattr(library_cache, "FLAGS", (*library_cache.FLAGS, "-g"))
        names.append(plan_build(machine.environment).name)
    with monkeypatch.context() as patch:
        source = shutil.copytree(library_cache.SOURCE, tmp_path / "source")
        patch.setattr(library_cache, "SOURCE", source)
        assert plan_build(machine.environment).name == names[0]
        (source / "pass.cpp").write_text((source / "pass.cpp").read_text() + "\n")
        names.append(plan_build(machine.environment).name)
    os.utime(machine.program, ns=(1, 1))  # an update of the compiler
    names.append(plan_build(machine.environment).name)
    assert len(set(names)) == 6


def test_a_wrapped_compiler_counts_too(tmp_path):
    machine = stand_in(tmp_path)
    environment = {**machine.environment, "CXX": f"env A=1 {machine.program}"}
    before = plan_build(environment).name
    os.utime(machine.program, ns=(1, 1))
    assert plan_build(environment).name != before


def truncate(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:5000])


def empty(library: Path) -> None:
    library.write_bytes(b"")


def lose_record(library: Path) -> None:
    library.with_suffix(".sha256").unlink()


def garble_record(library: Path) -> None:
    library.with_suffix(".sha256").write_bytes(b"\xff\n")


def open_to_others(library: Path) -> None:
    library.chmod(0o777)


def become_a_link(library: Path) -> None:
    library.replace(library.with_name("other"))
    library.symlink_to("other")


def become_another_s(library: Path) -> None:
    os.chown(library, 12345, -1)


@pytest.mark.parametrize(
    "damage",
    [truncate, empty, lose_record, garble_record, open_to_others, become_a_link, become_another_s],
)
def test_a_library_that_is_not_as_it_was_built_is_never_loaded(tmp_path, damage):
    if damage is become_another_s and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    machine = stand_in(tmp_path)
    opened(machine)
    damage(kept(machine))
    assert not is_intact(kept(machine))
    path, printed = opened(machine)
    assert path == kept(machine) and "compiling" in printed and len(machine.runs) == 2
    assert is_intact(path)
    assert opened(machine)[1] == ""


def test_two_processes_at_once_compile_once(tmp_path):
    machine = stand_in(tmp_path, f"sleep 0.7; {COPY}")
    code = (
        "from megatron_sorted.decoding.native.library_cache import built_library as b\n"
        "with b() as path: print(path)"
    )
    _, environment = own_module("", environment=machine.environment)
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    printed = {process.communicate(timeout=120)[0] for process in started}
    assert printed == {f"{kept(machine)}\n".encode()}
    assert len(machine.runs) == 1


def test_without_locks_two_processes_may_both_compile(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    machine = stand_in(tmp_path)
    monkeypatch.setattr(library_cache.fcntl, "flock", refuse)
    assert is_intact(opened(machine)[0])


def test_one_that_waits_too_long_for_another_compiles_itself(tmp_path, monkeypatch):
    machine = stand_in(tmp_path)
    machine.cache.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(library_cache, "COMPILE_SECONDS", 0.2)
    with (machine.cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert is_intact(opened(machine)[0])


def check_without_cache(machine, reason: str) -> None:
    """Check that a start compiles for itself, says why in one line, and leaves nothing behind."""
    temporary = Path(machine.environment["TMPDIR"])
    for count in (1, 2):
        printed = []
        with built_library(printed.append, machine.environment) as path:
            assert path.parent.parent == temporary
            library = load_library(path)
        assert library.native_instructions()  # it stays usable
        note, compiled = "".join(printed).splitlines()
        assert note.startswith("note: ") and reason in note
        assert compiled.startswith("compiling ")
        assert len(machine.runs) == count
        assert list(temporary.iterdir()) == []


@pytest.fixture
def own_temporary(tmp_path, monkeypatch):
    """Make Python's temporary folder that of the machine."""
    monkeypatch.setattr(library_cache.tempfile, "tempdir", str(tmp_path / "temporary"))


def test_a_read_only_home_serves_what_is_there(tmp_path, monkeypatch, own_temporary):
    machine = stand_in(tmp_path)
    opened(machine)

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(library_cache.os, "open", refuse)
    assert opened(machine) == (kept(machine), "")
    monkeypatch.undo()


def test_a_read_only_home_without_a_library(tmp_path, monkeypatch, own_temporary):
    machine, mkdir = stand_in(tmp_path), Path.mkdir

    def refuse(path, *arguments, **options):
        if path.is_relative_to(tmp_path / "home"):
            raise OSError(errno.EROFS, "Read-only file system")
        return mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    check_without_cache(machine, "cannot be used (Read-only file system)")


def test_a_full_home(tmp_path, own_temporary):
    full = 'case "$out" in *.cache*) echo "as: No space left on device"; exit 1; esac\n'
    machine = stand_in(tmp_path, full + COPY)
    path, printed = opened(machine)
    assert path.is_relative_to(tmp_path / "temporary") and not path.exists()
    assert f"note: the folder {machine.cache} is full. Until then every start" in printed
    assert len(machine.runs) == 2
    assert [file.name for file in machine.cache.iterdir()] == ["lock"]
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_home_that_is_full_when_the_library_is_kept(tmp_path, monkeypatch, own_temporary):
    machine = stand_in(tmp_path)

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(library_cache.os, "replace", refuse)
    printed = []
    with built_library(printed.append, machine.environment) as path:
        load_library(path)
    assert "cannot be written (No space left on device)" in "".join(printed)
    assert list(machine.cache.glob("*.so")) == []


def test_a_folder_that_belongs_to_another_user(tmp_path, monkeypatch, own_temporary):
    machine = stand_in(tmp_path)
    machine.cache.mkdir(parents=True, mode=0o700)
    user = os.geteuid()
    monkeypatch.setattr(private_folder.os, "geteuid", lambda: user + 1)
    machine.environment["XDG_CACHE_HOME"] = str(tmp_path / "home" / ".cache")
    check_without_cache(machine, f"belongs to user {user}; MEGATRON_SORTED_CACHE may name another")
    del machine.environment["XDG_CACHE_HOME"]
    with pytest.raises(CacheError, match=f"home .*/home belongs to user {user}"):
        cache_folder(machine.environment)


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
@pytest.mark.parametrize("place", ["native", "", ".."])
def test_folders_to_which_others_may_write(tmp_path, monkeypatch, own_temporary, mode, place):
    monkeypatch.setattr(private_folder, "_is_own_group", lambda number: False)
    machine = stand_in(tmp_path)
    machine.cache.mkdir(parents=True, mode=0o700)
    (machine.cache.parent / place).chmod(mode)
    check_without_cache(machine, "others may ")
    assert list(machine.cache.iterdir()) == []


def test_a_sticky_folder_and_a_group_of_one_user_are_private(tmp_path, monkeypatch):
    machine = stand_in(tmp_path)
    machine.cache.parent.mkdir(parents=True, mode=0o700)
    machine.cache.parent.chmod(0o1777)
    machine.cache.parent.parent.chmod(0o770)
    monkeypatch.setattr(private_folder, "_is_own_group", lambda number: True)
    assert opened(machine)[0] == kept(machine)


@pytest.mark.parametrize(
    ("name", "members", "is_own"),
    [("ann", [], True), ("ann", ["ann"], True), ("ann", ["bob"], False), ("staff", [], False)],
)
def test_a_group_is_the_user_s_own(monkeypatch, name, members, is_own):
    group = type("Group", (), {"gr_name": name, "gr_mem": members})
    user = type("User", (), {"pw_name": "ann"})
    monkeypatch.setattr(private_folder.grp, "getgrgid", lambda number: group)
    monkeypatch.setattr(private_folder.pwd, "getpwuid", lambda number: user)
    assert private_folder._is_own_group(5) == is_own


def test_links_are_followed_and_what_is_above_their_targets_is_judged(
    tmp_path, monkeypatch, own_temporary
):
    monkeypatch.setattr(private_folder, "_is_own_group", lambda number: False)
    machine = stand_in(tmp_path)
    disk = tmp_path / "disks" / "disk"
    disk.mkdir(parents=True)
    (tmp_path / "home" / ".cache").symlink_to(disk)
    assert opened(machine)[0].resolve() == next(disk.rglob("*.so"))
    disk.parent.chmod(0o777)
    path, printed = opened(machine)
    assert path.is_relative_to(tmp_path / "temporary") and f"in {disk.parent};" in printed


def test_links_in_a_circle(tmp_path, own_temporary):
    machine = stand_in(tmp_path)
    (tmp_path / "home" / ".cache").symlink_to(tmp_path / "home" / ".cache")
    check_without_cache(machine, "cannot be used")


def test_a_file_in_the_folder_s_place(tmp_path, own_temporary):
    machine = stand_in(tmp_path)
    (tmp_path / "home" / ".cache").write_text("")
    check_without_cache(machine, "cannot be used (Not a directory)")


def test_a_folder_from_which_no_code_runs(tmp_path, monkeypatch, own_temporary):
    class Flags:
        f_flag = os.ST_NOEXEC

    machine, statvfs = stand_in(tmp_path), os.statvfs
    home = str(tmp_path / "home")
    with monkeypatch.context() as patch:
        patch.setattr(
            private_folder.os,
            "statvfs",
            lambda path: Flags if str(path).startswith(home) else statvfs(path),
        )
        check_without_cache(machine, "(mounted noexec)")
        patch.setattr(private_folder.os, "statvfs", lambda path: Flags)
        with pytest.raises(NativeError, match="noexec"):
            opened(machine)


def test_homes(tmp_path, monkeypatch):
    home, name = tmp_path / "home", "megatron_sorted/native"
    home.mkdir()
    assert cache_folder({"HOME": str(home)}) == home / ".cache" / name
    assert cache_folder({"HOME": str(home), "XDG_CACHE_HOME": "/x"}) == Path("/x") / name
    assert cache_folder({"HOME": str(home), "XDG_CACHE_HOME": "x"}) == home / ".cache" / name
    assert cache_folder({"MEGATRON_SORTED_CACHE": "/y"}) == Path("/y/native")
    user = type("User", (), {"pw_dir": str(home)})
    monkeypatch.setattr(private_folder.pwd, "getpwuid", lambda number: user)
    assert cache_folder({}) == cache_folder({"HOME": ""}) == home / ".cache" / name

    def unknown(number):
        raise KeyError(number)

    monkeypatch.setattr(private_folder.pwd, "getpwuid", unknown)
    with pytest.raises(CacheError, match="HOME is not set; MEGATRON_SORTED_CACHE may name"):
        cache_folder({})
    with pytest.raises(CacheError, match="nowhere cannot be used"):
        cache_folder({"HOME": str(tmp_path / "nowhere")})
    assert not (tmp_path / "nowhere").exists()


def test_what_killed_compilations_left_is_removed(tmp_path, own_temporary):
    machine = stand_in(tmp_path)
    temporary = tmp_path / "temporary"
    prefix = f"megatron_sorted-{os.geteuid()}-"
    machine.cache.mkdir(parents=True, mode=0o700)
    old = [machine.cache / ".building-old", temporary / f"{prefix}old"]
    new = [machine.cache / ".building-new", temporary / f"{prefix}new", temporary / "other"]
    for folder in (*old, *new):
        folder.mkdir()
        (folder / "part.s").touch()
    for folder in (*old, new[2]):
        os.utime(folder, (0, time.time() - 7200))
    opened(machine)
    machine.cache.chmod(0o777)
    opened(machine)
    assert [path for path in (*old, *new) if path.exists()] == new


def crash(tmp_path: Path) -> str:
    library = small_library(tmp_path, "int native_version() { __builtin_trap(); }")
    return f'cp "{library}" "$out"'


def be_wrong(tmp_path: Path) -> str:
    return f'cp "{small_library(tmp_path, WITHOUT_PRODUCTS)}" "$out"'


def be_garbage(tmp_path: Path) -> str:
    return 'echo garbage > "$out"'


def be_of_another_version(tmp_path: Path) -> str:
    library = small_library(tmp_path, WITHOUT_PRODUCTS.replace(f"return {VERSION}", "return 99"))
    return f'cp "{library}" "$out"'


def lack_functions(tmp_path: Path) -> str:
    return f'cp "{small_library(tmp_path, "int x;")}" "$out"'


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (crash, r"crashed with SIG(ILL|TRAP)"),
        (be_wrong, "its products in float32 are wrong by"),
        (be_garbage, "cannot be loaded: .*(ELF|short|header)"),
        (be_of_another_version, f"is version 99, not {VERSION}"),
        (lack_functions, "cannot be loaded: .*undefined symbol"),
    ],
)
def test_a_library_that_does_not_work_is_tried_once(tmp_path, what, reason):
    machine = stand_in(tmp_path, what(tmp_path))
    printed = []
    with (
        pytest.raises(NativeError, match=f"does not work here: .*{reason}"),
        built_library(printed.append, machine.environment),
    ):
        pass
    assert "".join(printed) == "compiling the decoder for this CPU, once ... it failed\n"
    assert list(machine.cache.glob("*.so")) == []
    [refused] = machine.cache.glob("*.refused")
    with pytest.raises(NativeError, match=f"{reason}.*; delete {refused} to try again"):
        opened(machine)
    assert len(machine.runs) == 1
    refused.unlink()
    with pytest.raises(NativeError, match=reason):
        opened(machine)
    assert len(machine.runs) == 2
    stand_in(tmp_path)  # a repaired compiler is another one
    assert opened(machine)[0] == kept(machine)


def test_a_library_that_hangs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(library_cache, "TRIAL_SECONDS", 1.0)
    library = small_library(tmp_path, "int native_version() { for (volatile int i = 0;;) ++i; }")
    machine = stand_in(tmp_path, f'cp "{library}" "$out"')
    with pytest.raises(NativeError, match="hangs when it is tried"):
        opened(machine)
    with pytest.raises(NativeError, match="hangs when it is tried; delete"):
        opened(machine)
