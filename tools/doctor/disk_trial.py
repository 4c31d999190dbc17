"""Writes, locks and reads in a folder, and says as JSON how it went: a script of its own, since a file system may hang.

    python disk_trial.py FOLDER MEBIBYTES
"""

import fcntl
import json
import os
import sys
import tempfile
import time


def trial(folder: str, mebibytes: int) -> dict[str, object]:
    """Returns seconds to write and flush, whether what was read is what was written, whether locks work, and free space."""
    facts: dict[str, object] = {}
    block = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder, prefix=".doctor_") as file:
        began = time.monotonic()
        for _ in range(mebibytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        facts["seconds"] = time.monotonic() - began
        file.seek((mebibytes - 1) * len(block))
        facts["same"] = file.read() == block
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            facts["locks"] = True
        except OSError as error:
            facts["locks"] = False
            facts["lock_error"] = error.strerror
    state = os.statvfs(folder)
    # some file systems have no count of files: 0 of 0
    return {**facts, "free": state.f_bavail * state.f_frsize, "files": state.f_favail if state.f_files else None}


if __name__ == "__main__":
    try:
        answer = trial(sys.argv[1], int(sys.argv[2]))
    except OSError as error:
        answer = {"error": error.strerror or str(error)}
    print(json.dumps(answer))
