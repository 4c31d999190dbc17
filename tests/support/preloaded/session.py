"""The preloaded servers of one test run: their start, folder, stand-in for ``python``, and end."""

import fcntl
import json
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
FOLDER = "SORTED_TEST_SERVERS"
"""Environment variable with the session's folder, by which workers share its servers."""
STAND_IN = """\
#!{python} -IS
import sys
sys.path.insert(0, {here!r})
import stand_in
stand_in.main({python!r}, {root!r}, {folder!r})
"""
END_SECONDS = 10
MAX_PARENT_BYTES = 107 - len("/preloaded_12345678/transformers.socket.new")


def open_session() -> None:
    """Create the folder of this test run, unless a parent process of this Python has.

    No server starts yet. The parent may be a test that runs tests in another environment, whose
    packages its servers do not have.
    """
    started_by = Path(os.environ.get(FOLDER, "/nowhere")) / "session.python"
    if started_by.is_file() and started_by.read_text() == sys.executable:
        return
    folder = Path(tempfile.mkdtemp(prefix="preloaded_", dir=_parent_for_sockets()))
    (folder / "session.pid").write_text(str(os.getpid()))
    (folder / "session.python").write_text(sys.executable)
    stand_in = folder / "python"
    stand_in.write_text(
        STAND_IN.format(python=sys.executable, here=str(HERE), root=str(ROOT), folder=str(folder))
    )
    stand_in.chmod(0o755)
    os.environ[FOLDER] = str(folder)
    os.environ.setdefault(
        "PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir()
    )  # results of failed tests stay where they always are
    (folder / "tmp").mkdir()
    os.environ["TMPDIR"] = str(
        folder / "tmp"
    )  # what killed programs leave behind goes with the session
    tempfile.tempdir = None


def _parent_for_sockets() -> str:
    """Return the temporary folder, or /tmp where the address of a socket in it would be too long.

    The system takes 107 bytes; the folder of a test that runs tests can be longer than 70.
    """
    parent = tempfile.gettempdir()
    return parent if len(os.fsencode(parent)) < MAX_PARENT_BYTES else "/tmp"


def close_session() -> None:
    """End the servers and their forks and remove the folder, in the process that created it."""
    folder = Path(os.environ.get(FOLDER, "/nowhere"))
    if not folder.is_dir() or (folder / "session.pid").read_text() != str(os.getpid()):
        return
    servers = [int(path.read_text()) for path in folder.glob("*.pid") if path.name != "session.pid"]
    for server in servers:
        with suppress(ProcessLookupError):
            os.kill(server, signal.SIGTERM)
    until = time.monotonic() + END_SECONDS
    while (
        any(Path(f"/proc/{server}/fd/0").exists() for server in servers)
        and time.monotonic() < until
    ):
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)
    del os.environ[FOLDER], os.environ["TMPDIR"]
    tempfile.tempdir = None


def stand_in() -> str:
    """Return the path of the stand-in for ``python``."""
    return str(_folder() / "python")


def call(
    kind: str, module: str, function: str, arguments: tuple, environment: dict[str, str]
) -> tuple[socket.socket, int]:
    """Have the server of that kind call a function in a fork of it.

    Returns:
        The connection, whose end ends the fork, and an open file with the pickled ("done", value)
        or ("failed", traceback).
    """
    sys.path.insert(0, str(HERE))
    try:
        import preloaded_messages as messages
        import stand_in as client
    finally:
        sys.path.remove(str(HERE))
    connection = client.connect(kind, sys.executable, _folder())
    result, write_end = os.pipe()
    try:
        request = {
            "module": module,
            "function": function,
            "arguments": pickle.dumps(arguments).hex(),
            "environment": environment,
            "asker": os.getpid(),
        }
        messages.send(connection, json.dumps(request).encode(), (1, 2, write_end))
    finally:
        os.close(write_end)
    return connection, result


def _folder() -> Path:
    return Path(os.environ[FOLDER])


def new_path(name: str) -> Path:
    """Return an unused path in the session's folder, which is removed with the folder."""
    return _folder() / f"{name}.{uuid.uuid4().hex}"


@contextmanager
def turn(what: str, alone: bool) -> Iterator[None]:
    """Hold a turn among the workers of this test run, alone or together with others not alone."""
    with open(_folder() / f"{what}.turn", "w") as turns:
        fcntl.flock(turns, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def wait_for_end(connection: socket.socket) -> None:
    """Wait until the server has reaped the fork behind a connection."""
    while connection.recv(4096):
        pass


def spent_seconds() -> float:
    """Return the CPU seconds of this process and its ended children and forks."""
    spent = _folder() / f"cpu.{os.getpid()}"
    forked = sum(map(float, spent.read_text().split())) if spent.exists() else 0.0
    times = os.times()
    return forked + times.user + times.system + times.children_user + times.children_system
