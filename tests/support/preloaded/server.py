"""A process that imports much once and forks for each request: ``python server.py KIND FOLDER``.

It has one thread and joins no process group, so that a fork of it is like a process that has just
done its imports.
"""

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import pickle
import resource
import selectors
import shutil
import signal
import socket
import sys
import threading
import traceback
import types
from pathlib import Path
from typing import NoReturn

import preloaded_messages as messages

PRELOADED = {
    "megatron": "tests.support.preloaded.for_megatron",
    "transformers": "tests.support.preloaded.for_transformers",
}
ALIVE_SECONDS = 2
"""The interval at which the server checks that the test run still exists."""


class Server:
    """A server that forks a child for each connection and reports its process number and status.

    It ends a child whose client has ended.
    """

    def __init__(self, address: str, session: int):
        self._session, self._stopped = session, False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{address}.new")
        self._listener.listen(256)
        self._children: dict[int, socket.socket] = {}
        self._folder = Path(address).parent
        self._owners: dict[int, int] = {}
        self._selector = selectors.DefaultSelector()
        self._wake, waker = socket.socketpair()
        for end in (self._wake, waker):
            end.setblocking(False)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        self._own = (self._listener, self._wake, waker)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_stopped", True))
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        os.rename(f"{address}.new", address)  # who can connect need not wait

    def next_child(self) -> tuple[dict, list[int], socket.socket] | None:
        """Serve until a request has been forked; return it in the child.

        In the server return None when it is to end.
        """
        while not self._stopped and os.path.exists(f"/proc/{self._session}"):
            for key, _ in self._selector.select(ALIVE_SECONDS):
                if key.fileobj is self._listener:
                    request = self._accept()
                    if request is not None:
                        return request
                elif key.fileobj is self._wake:
                    with contextlib.suppress(BlockingIOError):
                        self._wake.recv(4096)
                else:
                    self._closed_early(key.data, key.fileobj)
            self._reap()
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return None

    def _accept(self) -> tuple[dict, list[int], socket.socket] | None:
        connection, _ = self._listener.accept()
        body, descriptors = messages.receive(connection, 3)
        if body is None:
            connection.close()
            return None
        request = json.loads(body)
        child = os.fork()
        if not child:
            self._leave()
            return request, descriptors, connection
        for descriptor in descriptors:
            os.close(descriptor)
        self._children[child] = connection
        self._owners[child] = self._owners.get(request["asker"], request["asker"])
        self._selector.register(connection, selectors.EVENT_READ, child)
        with contextlib.suppress(OSError):
            messages.send(connection, json.dumps({"pid": child}).encode())
        return None

    def _leave(self) -> None:
        """Become an ordinary process: own session, no server sockets, Python's initial signals."""
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._selector.close()
        for end in (*self._own, *self._children.values()):
            end.close()

    def _closed_early(self, child: int, connection: socket.socket) -> None:
        """End a child whose client was killed; a live one sends nothing after its request."""
        self._selector.unregister(connection)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)

    def _reap(self) -> None:
        while True:
            try:
                child, status, used = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not child:
                return
            connection = self._children.pop(child)
            with open(self._folder / f"cpu.{self._owners.pop(child)}", "a") as spent:
                spent.write(f"{used.ru_utime + used.ru_stime}\n")
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(connection)
            with contextlib.suppress(OSError):
                messages.send(connection, json.dumps({"status": status}).encode())
            connection.close()


def become(request: dict, descriptors: list[int], connection: socket.socket, stand_in: str) -> None:
    """Take over the client's streams, environment, directory, limits and dependent Python state."""
    connection.close()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    os.umask(request["umask"])
    for limit, soft, hard in request["limits"]:
        resource.setrlimit(limit, (soft, hard))
    os.nice(request["nice"] - os.nice(0))
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
    in_c_locale = (
        os.environ.get("LC_ALL") or os.environ.get("LC_CTYPE") or os.environ.get("LANG") or "C"
    )
    errors = errors or (
        "surrogateescape"
        if in_c_locale in ("C", "POSIX") and "PYTHONIOENCODING" not in os.environ
        else "strict"
    )
    sys.stdin = io.TextIOWrapper(
        io.BufferedReader(io.FileIO(0, closefd=False)), encoding or "utf-8", errors
    )
    sys.stdout = _writer(1, encoding or "utf-8", errors)
    sys.stderr = _writer(2, encoding or "utf-8", "backslashreplace")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    # what the command starts with its own interpreter is forked too
    sys.executable = stand_in
    added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*added, *(path for path in sys.path if path not in added)]


def _writer(number: int, encoding: str, errors: str) -> io.TextIOWrapper:
    raw = io.FileIO(number, "w", closefd=False)
    through = bool(os.environ.get("PYTHONUNBUFFERED"))
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding,
        errors,
        write_through=through,
        line_buffering=raw.isatty() or number == 2 or through,
    )


def run_to_the_end(command: list[str]) -> NoReturn:
    """Run a script and end this process as python would, without finalizing the interpreter.

    That would cost tenths of a second. Threads are waited for, functions registered with ``atexit``
    are called, and output that cannot be written gives status 120.
    """
    status = 0
    try:
        run_main(command)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if status == 1 and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        sys.excepthook(type(error), error, error.__traceback__.tb_next.tb_next)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError as error:
            status = 120
            with contextlib.suppress(OSError):
                print(
                    f"Exception ignored while flushing: {error!r}", file=sys.__stderr__, flush=True
                )
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)


def run_main(command: list[str]) -> None:
    """Run a script, a module (``-m NAME``) or lines (``-c CODE``) as ``__main__``."""
    if command[0] == "-m":
        import runpy

        sys.argv = command[1:]
        sys.modules.pop(command[1], None)  # preloaded with what it imports
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        return
    module = types.ModuleType("__main__")
    if command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        sys.path.insert(0, "")
        sys.modules["__main__"] = module
        exec(compile(command[1], "<string>", "exec"), module.__dict__)
        return
    module.__file__ = command[0]
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).resolve().parent))
    sys.modules["__main__"] = module
    exec(compile(Path(command[0]).read_bytes(), command[0], "exec"), module.__dict__)


def run_function(request: dict, descriptors: list[int]) -> None:
    """Call a function, write its result or traceback to the third open file, and end at once."""
    os.environ.update(request["environment"])
    sys.modules["__main__"] = types.ModuleType(
        "__main__"
    )  # what multiprocessing spawns must not import this file
    for number, descriptor in zip((1, 2), descriptors, strict=False):
        os.dup2(descriptor, number)
    try:
        function = getattr(importlib.import_module(request["module"]), request["function"])
        arguments = pickle.loads(bytes.fromhex(request["arguments"]))
        body = pickle.dumps(("done", function(*arguments)))
    except BaseException:  # the test must see every error
        body = pickle.dumps(("failed", traceback.format_exc()))
    with open(descriptors[2], "wb") as result:
        result.write(body)
    if "multiprocessing.util" in sys.modules:
        sys.modules[
            "multiprocessing.util"
        ]._exit_function()  # ends processes that the function started
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # taking a preloaded interpreter apart costs more than most tests do


def main(kind: str, folder: str) -> None:
    """Import what this kind of server is for, then serve; in a child, do what was requested."""
    root = str(Path(__file__).resolve().parents[3])
    sys.path[:1] = [str(Path(__file__).resolve().parent)]
    sys.path.insert(1, root)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    importlib.import_module(PRELOADED[kind])
    sys.path.remove(root)
    tasks = os.listdir("/proc/self/task")
    if len(tasks) > 1 or threading.active_count() > 1:
        sys.exit(f"{kind}: {len(tasks)} threads after the imports; a fork would lose all but one")
    gc.collect()
    gc.freeze()
    session = int(Path(folder, "session.pid").read_text())
    child = Server(f"{folder}/{kind}.socket", session).next_child()
    if child is None:
        if not os.path.exists(f"/proc/{session}"):  # it was killed, and could not remove its folder
            shutil.rmtree(folder, ignore_errors=True)
        return
    request, descriptors, connection = child
    sys.path.pop(0)
    if "function" in request:
        sys.path.insert(0, root)
        connection.close()
        run_function(request, descriptors)
        return
    become(request, descriptors, connection, f"{folder}/python")
    run_to_the_end(request["words"])


if __name__ == "__main__":
    main(*sys.argv[1:])
