"""A lock that lets only one run at a time save into a directory."""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from megatron_sorted.errors import CheckpointError

LOCK = ".lock"

# A run that was requested to end, or whose launcher was killed, may need a moment to finish.
PATIENCE_SECONDS = 8.0


class DirectoryLock:
    """The exclusive right to save into a directory.

    It is held until ``release`` or the end of the process, however it ends. It is a record lock of
    the operating system: it works across hosts on NFS, child processes do not inherit it, and it
    ends with the process. The lock file stays; its content is for people.
    """

    def __init__(self, root: str | Path):
        self.path = Path(root) / LOCK
        self._file = None

    def acquire(self, patience_seconds: float = PATIENCE_SECONDS) -> bool:
        """Acquire the lock; return False where the file system does not support locks.

        Raises:
            CheckpointError: Another process still holds it after ``patience_seconds``.
        """
        file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 - closing it releases the lock
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
                        f"--save: another run is saving into {self.path.parent} ({holder}). "
                        "Wait for it, end it, or give another directory."
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
        """Release the lock."""
        if self._file is not None:
            self._file.close()
            self._file = None
