"""Replacing and removing files so that a kill at any instruction loses nothing.

A new file is complete and on disk before it takes the name of the old one. Where the system can
swap two names in one step (Linux, local file systems), that step is the replacement.
"""

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
UNKNOWN_CALL = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


def same_path(one: str | Path | None, other: str | Path | None) -> bool:
    """Return whether two paths name the same file or directory: relative, through links, with /.

    >>> same_path("runs/a/", "./runs/../runs/a")
    True
    """
    if one is None or other is None:
        return False
    return os.path.realpath(one) == os.path.realpath(other)


def is_inside(inner: str | Path, outer: str | Path) -> bool:
    """Return whether ``inner`` is ``outer`` or lies below it."""
    return Path(os.path.realpath(inner)).is_relative_to(os.path.realpath(outer))


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on disk, if the file system supports that."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems refuse; they keep the order of renames themselves
    finally:
        os.close(handle)


def sync_file(path: str | Path) -> None:
    """Wait until a file's content is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write; its file then takes the name ``path``.

    A reader sees the old or the new file, never half of one, also after a loss of power. If the
    block fails, the old file stays. If ``path`` is a link, its target is replaced.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write a file as ``replaced_file`` does.

    Raises:
        OSError: The file cannot be written; the old file is unchanged.
    """
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; return False if the system or the file system cannot.

    Source: renameat2(2).

    Raises:
        OSError: One of them is missing or cannot be renamed; both are unchanged.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNKNOWN_CALL:
        return False
    raise OSError(number, os.strerror(number), str(other))


def take_place(new: Path, final: Path, old: Path) -> None:
    """Rename ``final`` to ``old`` and ``new`` to ``final``: two steps, where `exchange` cannot.

    Raises:
        OSError: One of them cannot be renamed; ``final`` is unchanged.
    """
    os.rename(final, old)
    try:
        os.rename(new, final)
    except OSError:
        os.rename(old, final)
        raise


def remove_tree(path: Path) -> None:
    """Delete a directory, a file or a link; the target of a link stays.

    Raises:
        OSError: Something cannot be deleted.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def discard_tree(path: Path) -> None:
    """Delete as much of ``path`` as can be deleted."""
    with contextlib.suppress(OSError):
        remove_tree(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
