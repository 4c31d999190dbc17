"""Folders for compiled libraries, where nobody else can put one."""

import grp
import os
import pwd
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megatron_sorted.decoding.native.compiler import CacheError, NativeError

CACHE_VARIABLE = "MEGATRON_SORTED_CACHE"
REMEDY = f"{CACHE_VARIABLE} may name another folder"
STALE_SECONDS = 3600.0
"""Age from which a folder of an unfinished compilation is one that was killed."""


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the user's folder for compiled libraries; it may not exist.

    Raises:
        CacheError: The user has no home.
    """
    if named := environment.get(CACHE_VARIABLE):
        return Path(named).absolute() / "native"
    base = Path(environment.get("XDG_CACHE_HOME") or "")
    if not base.is_absolute():  # relative ones are to be ignored
        base = _home(environment) / ".cache"
    return base / "megatron_sorted" / "native"


def _home(environment: Mapping[str, str]) -> Path:
    home = environment.get("HOME")
    if not home:
        try:
            home = pwd.getpwuid(os.geteuid()).pw_dir
        except KeyError:
            raise CacheError(f"HOME is not set; {REMEDY}") from None
    try:
        owner = os.stat(home).st_uid
    except OSError as error:
        raise CacheError(f"the home {home} cannot be used ({error.strerror}); {REMEDY}") from error
    if owner != os.geteuid():  # as under sudo: a folder made there would be in its owner's way
        raise CacheError(f"the home {home} belongs to user {owner}; {REMEDY}")
    return Path(home)


def private_folder(folder: Path) -> Path:
    """Create a folder that only this user can write to or replace; return it.

    Raises:
        CacheError: It cannot be created or used, another user owns it, or others may write to it
            or to a folder above it.
    """
    try:
        for path in [*reversed(folder.parents), folder]:
            if not path.exists():
                path.mkdir(mode=0o700, exist_ok=True)
        found = folder.stat()
        if not stat.S_ISDIR(found.st_mode):
            raise CacheError(f"the cache {folder} is no folder; {REMEDY}")
        if found.st_uid != os.geteuid():
            raise CacheError(f"the cache {folder} belongs to user {found.st_uid}; {REMEDY}")
        if stat.S_IMODE(found.st_mode) & 0o022:
            raise CacheError(f"others may write to the cache {folder}: chmod 700 {folder}")
        # of a link both the folder that holds it and those where it leads
        for path in dict.fromkeys([*folder.parents, *folder.resolve().parents]):
            if _is_open(path.stat()):
                raise CacheError(f"others may replace the cache {folder} in {path}; {REMEDY}")
        _check_runs_code(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        reason = getattr(error, "strerror", None) or error
        raise CacheError(f"the cache {folder} cannot be used ({reason}); {REMEDY}") from error
    return folder


def _is_open(found: os.stat_result) -> bool:
    """Return whether other users may rename what is in a folder."""
    mode = stat.S_IMODE(found.st_mode)
    if mode & stat.S_ISVTX:  # such as /tmp: only their owners may rename files
        return False
    return bool(mode & 0o002 or (mode & 0o020 and not _is_own_group(found.st_gid)))


def _is_own_group(number: int) -> bool:
    """Return whether a group is the user's alone, as many systems have one for every user."""
    try:
        group, user = grp.getgrgid(number), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def _check_runs_code(folder: Path) -> None:
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise CacheError(f"no code can be run from {folder} (mounted noexec); {REMEDY}")


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a folder of this process, and remove it; a loaded library stays usable.

    Raises:
        NativeError: There is no place for one.
    """
    prefix = f"megatron_sorted-{os.geteuid()}-"
    try:
        remove_stale(Path(tempfile.gettempdir()), prefix)
        with tempfile.TemporaryDirectory(prefix=prefix) as folder:
            _check_runs_code(Path(folder))
            yield Path(folder)
    except OSError as error:
        raise NativeError(f"no temporary folder can be used: {error}") from error


def remove_stale(folder: Path, prefix: str) -> None:
    """Remove the folders of compilations that were killed: the user's own, with this prefix."""
    for path in folder.glob(f"{prefix}*"):
        try:
            found = path.lstat()
        except OSError:
            continue
        if found.st_uid == os.geteuid() and time.time() - found.st_mtime > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
