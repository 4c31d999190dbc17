"""One run at a time saves into a directory."""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from megatron_sorted.errors import CheckpointError

LOCK = ".lock"
# A run that was told to end, or whose launcher was killed, may need a moment to be gone.
PATIENCE_SECONDS = 8.0


class DirectoryLock:
    """The right to save into a directory, held until ``release`` or the end of the process, however it ends.

    A record lock of the operating system: it works across hosts on NFS, is not inherited by child processes and vanishes with the
    process. The lock file stays; what it says is for people.
    """

    def __init__(self, root: str | Path):
        self.path = Path(root) / LOCK
        self._file = None

    def acquire(self, patience_seconds: float = PATIENCE_SECONDS) -> bool:
        """Return True once this process holds the directory, False where the file system knows no locks.

        Raises:
            CheckpointError: Another process holds it, and still does after ``patience_seconds``.
        """
        file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 - closing it would give the lock up
        until = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    file.close()
                    return False
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                if time.monotonic() >= until:
                    file.seek(0)
                    holder = file.read().strip() or "unknown"
                    file.close()
                    raise CheckpointError(
                        f"--save: another run is saving into {self.path.parent} ({holder}). Wait for it, end it, or give another "
                        "directory."
                    ) from None
                time.sleep(0.2)
        file.seek(0)
        file.truncate()
        holder = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        if "SLURM_JOB_ID" in os.environ:
            holder["job"] = os.environ["SLURM_JOB_ID"]
        file.write(json.dumps(holder) + "\n")
        file.flush()
        self._file = file
        return True

    def release(self) -> None:
        """Give the directory up."""
        if self._file is not None:
            self._file.close()
            self._file = None
