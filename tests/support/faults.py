"""Kills and faults at every change of names on disk.

Work is repeated in children that end before their n-th change. Python reports every rename,
removal, new directory, new link and opening for writing to audit hooks before it happens; a swap of
two names shows as the look-up of the system call.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
MOST = 300
Work = Callable[[], object]


def _is_change(event: str, arguments: tuple) -> bool:
    if event == "open":
        path, _, flags = arguments
        return bool(flags & WRITING) and not str(path).startswith(("/dev/", "/proc/"))
    return event in CHANGES or (event == "ctypes.dlsym" and arguments[1] == "renameat2")


def _child(work: Work, number: int, kills: bool) -> None:
    """Do the work; at its change ``number``, from 0, get killed or raise. Never return."""
    left = [number]

    def at_change(event: str, arguments: tuple) -> None:
        if left[0] < 0 or not _is_change(event, arguments):
            return
        left[0] -= 1
        if left[0] < 0:
            if kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.EIO, "injected fault")

    status = 0
    sys.addaudithook(at_change)  # it cannot be removed, but the process ends here
    try:
        work()
    except BaseException:
        status = 1
    os._exit(status if left[0] < 0 else 2 + status)


def interrupted(work: Work, prepare: Work, kills: bool = True) -> Iterator[int]:
    """Yield n after ``work`` was interrupted at its n-th change, until it ends undisturbed.

    ``prepare`` runs before each.
    """
    for number in range(MOST):
        prepare()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _child(work, number, kills)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) >= 2:
            assert os.WEXITSTATUS(status) == 2, "the undisturbed work failed"
            assert number >= 1, "no change was seen"
            return
        yield number
    raise AssertionError(f"more than {MOST} changes")
