"""A stand-in for ``python``: servers fork the scripts they serve, the real one runs the others.

The first lines of the stand-in (``session.py`` writes them) give ``main`` the real interpreter, the
project's root and the session's folder. It imports nothing from the project but ``messages``, whose
folder is on the path.
"""

import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import preloaded_messages as messages

MEGATRON, TRANSFORMERS = "megatron", "transformers"
WITH_MEGATRON = (
    "pretrain_sorted.py",
    "tools/plan",
    "tools/doctor",
    "tools/launch_facts.py",
    "tools/accept_npu.py",
    "tools/bench",
)
"""Path prefixes of scripts that need megatron; the others must work without it."""
TORCHRUN = "torch.distributed.run"
FORK_CODE = "SORTED_FORK_CODE"
"""Environment variable of the tests of this folder: `-c CODE` is forked too."""
LIMITS = (
    resource.RLIMIT_FSIZE,
    resource.RLIMIT_NOFILE,
    resource.RLIMIT_AS,
    resource.RLIMIT_CORE,
    resource.RLIMIT_CPU,
)
PASSED_ON = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGQUIT,
)
START_SECONDS = 240


def server_for(arguments: list[str], root: str) -> tuple[str | None, list[str]]:
    """Return the server for these arguments (None: the real python), and the rest of them."""
    rest = arguments[1:] if arguments[:1] == ["-u"] else arguments
    if rest[:2] == ["-m", TORCHRUN]:
        return MEGATRON, rest
    if rest[:1] == ["-c"] and FORK_CODE in os.environ:
        return TRANSFORMERS, rest
    if not rest or rest[0].startswith("-"):
        return None, rest
    path = os.path.relpath(os.path.realpath(rest[0]), root)
    if not path.startswith(("tools/", "pretrain_sorted.py")):
        return None, rest
    return (MEGATRON if path.startswith(WITH_MEGATRON) else TRANSFORMERS), rest


def connect(kind: str, python: str, folder: Path) -> socket.socket:
    """Return a connection to the server of that kind, which is started if it does not run yet."""
    address = str(folder / f"{kind}.socket")
    until = time.monotonic() + START_SECONDS
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
            return connection
        except OSError:
            connection.close()
        if time.monotonic() > until or _has_ended(folder / f"{kind}.pid"):
            log = folder / f"{kind}.log"
            sys.exit(
                f"the preloaded server has ended, or did not start within {START_SECONDS} s: "
                f"{log.read_text() if log.exists() else ''}"
            )
        _start(kind, python, folder)
        time.sleep(0.02)


def _has_ended(record: Path) -> bool:
    """Return whether the server whose process number this file records has ended."""
    try:
        stat = Path(f"/proc/{int(record.read_text())}/stat").read_text()
    except FileNotFoundError:
        return record.exists()
    except ValueError:
        return False  # the record is being written
    return stat.rpartition(")")[2].split()[0] == "Z"


def _start(kind: str, python: str, folder: Path) -> None:
    """Start the server unless another process has, holding the lock of the session's folder."""
    with open(folder / f"{kind}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / f"{kind}.pid").exists():
            return
        with open(folder / f"{kind}.log", "wb") as log:
            server = subprocess.Popen(
                [python, str(Path(__file__).with_name("server.py")), kind, str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=_server_environment(),
                start_new_session=True,
            )
        (folder / f"{kind}.pid").write_text(str(server.pid))


def _server_environment() -> dict[str, str]:
    """Return the environment of servers: nothing from the first test, one thread per library."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {
        **kept,
        **threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }


def main(python: str, root: str, folder: str) -> None:
    """Do what ``python`` would do with this process's arguments."""
    kind, rest = server_for(sys.argv[1:], root)
    if kind is None:
        os.execv(python, [python, *sys.argv[1:]])
    umask = os.umask(0)
    os.umask(umask)
    ignored = [number for number in PASSED_ON if signal.getsignal(number) is signal.SIG_IGN]
    request = {
        "words": rest,
        "directory": os.getcwd(),
        "environment": dict(os.environ),
        "umask": umask,
        "ignored": ignored,
        "limits": [(limit, *resource.getrlimit(limit)) for limit in LIMITS],
        "nice": os.nice(0),
        "asker": os.getppid(),
    }
    pending: list[int] = []
    for number in PASSED_ON:
        if number not in ignored:
            signal.signal(number, lambda number, _: pending.append(number))
    connection = connect(kind, python, Path(folder))
    messages.send(connection, json.dumps(request).encode("utf-8", "surrogateescape"), (0, 1, 2))
    body, _ = messages.receive(connection)
    if body is None:
        sys.exit("the preloaded server closed the connection; see the log beside its socket")
    child = json.loads(body)["pid"]
    _end_as(_status_of(connection, child, pending))


def _status_of(connection: socket.socket, child: int, pending: list[int]) -> int:
    """Return the child's wait status; signals that come meanwhile go to the child."""
    for number in PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: _pass_on(child, number))
    for number in pending:
        _pass_on(child, number)
    body, _ = messages.receive(connection)
    if body is None:
        sys.exit("the preloaded server ended before its child")
    return json.loads(body)["status"]


def _pass_on(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended; its status is on the way
        os.kill(child, number)


def _end_as(status: int) -> None:
    """End this process as another ended: with its exit status, or by its signal."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), number)
        signal.pause()
    os._exit(os.WEXITSTATUS(status))
