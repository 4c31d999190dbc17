"""The HTTP server: time limits of connections, a bound on their number, a stop in known time."""

import asyncio
import ipaddress
import math
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_sorted.command_line import INTERRUPTED
from megatron_sorted.errors import SettingsError
from megatron_sorted.serving.worker import GenerationWorker

KEEP_ALIVE_SECONDS = 10
"""Longest time that a connection may be idle after a response."""
HEAD_SECONDS = 15
"""Longest time from connecting, or from the last response, to the end of a request's headers."""
BODY_SECONDS = 60
"""Longest time from the end of the headers to the end of the body."""
STALL_SECONDS = 60
"""Longest time that a client may leave a response unread when no more fits into the socket."""
MAX_CONNECTIONS = 512
BACKLOG = 128
DROPPED_AFTER = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
"""TCP's options: a client that vanished silently is noticed after two minutes."""


def most_connections() -> int:
    """Return the largest number of connections: half of the files that the process may open.

    The soft limit on open files is raised first, as far as the hard one allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = (
        4 * MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else min(4 * MAX_CONNECTIONS, hard)
    )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return (
        MAX_CONNECTIONS
        if soft == resource.RLIM_INFINITY
        else min(MAX_CONNECTIONS, max(soft // 2, 1))
    )


def bind(host: str, port: int) -> socket.socket:
    """Return a socket of this address and port (0: any free one) that does not listen yet.

    Raises:
        SettingsError: The address is wrong or taken; says what to change.
    """
    if not 0 <= port <= 65535:
        raise SettingsError(f"--port: {port} is not in 0..65535. Change it.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise SettingsError(
            f"--host: {host!r} is not an address ({getattr(error, 'strerror', None) or error}). "
            "Change it."
        ) from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # accepted connections inherit these
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, seconds in DROPPED_AFTER:
            if hasattr(socket, name):
                bound.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _address_error(host, port, error) from error
    return bound


def open_warning(bound: socket.socket) -> str | None:
    """Return a warning if other machines can connect to this socket; None if they cannot."""
    address = ipaddress.ip_address(bound.getsockname()[0].partition("%")[0])
    if (getattr(address, "ipv4_mapped", None) or address).is_loopback:
        return None
    return (
        f"warning: whoever reaches {address} can use this server, since no API key is set. "
        "Give --api-key-file, or --host 127.0.0.1 for this machine alone."
    )


def _address_error(host: str, port: int, error: OSError) -> SettingsError:
    return SettingsError(
        f"--host {host} --port {port}: {error.strerror}. Give an address of this machine and a "
        "--port (above 1023) that no other program has."
    )


class Connection(H11Protocol):
    """A client's connection, closed when the client keeps the server waiting.

    uvicorn itself does so only between two requests.

    Attributes:
        most: The largest number of connections; where there are more, the one that has kept the
            server waiting longest is closed.
        waits_since: Time (of ``time.monotonic``) since when the server waits for the client; None
            while the client waits for the server.
    """

    most = MAX_CONNECTIONS

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start to wait for a request; close another connection if there are too many."""
        self.limit: asyncio.TimerHandle | None = None
        self.waits_since: float | None = None
        super().connection_made(transport)
        self._wait(HEAD_SECONDS)
        if len(self.connections) > self.most:
            waiting = [
                one
                for one in self.connections
                if one.waits_since is not None and not one.transport.is_closing()
            ]
            min(waiting, key=lambda one: one.waits_since, default=self).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._wait(None)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Handle what arrived, and wait for the rest of the request."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._wait(BODY_SECONDS)
        if self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete:
            self._wait(None)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        before = self.cycle
        super().on_response_complete()
        if self.cycle is before:
            self._wait(HEAD_SECONDS)

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._wait(STALL_SECONDS)

    def resume_writing(self) -> None:
        """Stop waiting for the client to read."""
        super().resume_writing()
        self._wait(None)

    def _wait(self, seconds: float | None) -> None:
        """Give the client this many seconds to act; None stops the wait."""
        if self.limit is not None:
            self.limit.cancel()
        self.limit = (
            None if seconds is None else self.loop.call_later(seconds, self.transport.abort)
        )
        self.waits_since = None if seconds is None else time.monotonic()


class Server(uvicorn.Server):
    """uvicorn's server, with a call when clients can connect and a stop within known time.

    Args:
        config: uvicorn's configuration.
        worker: The owner of the model, stopped with the server.
        seconds: Time within which to stop.
        announce: Called when clients can connect.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        worker: GenerationWorker,
        seconds: float,
        announce: Callable[[], None],
    ):
        super().__init__(config)
        self.worker, self.seconds, self.announce = worker, seconds, announce
        self.end_at = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop in time; at the second signal stop at once, also with a clean-up."""
        if self.should_exit:
            self.seconds, self.end_at = 0, time.monotonic()
        super().handle_exit(sig, frame)
        self.force_exit = False  # it would end responses without an error, and leave tasks behind

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then announce it."""
        await super().startup(sockets)
        self.announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for running jobs most of the time, then end them with an error, then connections."""
        # the rest of the time is for the end of the process
        self.end_at = time.monotonic() + self.seconds - min(0.5, self.seconds / 4)
        ending = asyncio.create_task(self._end_texts())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_texts(self) -> None:
        while time.monotonic() < self.end_at - min(1, self.seconds / 2):
            await asyncio.sleep(0.05)
        self.worker.stop()
        await asyncio.sleep(0.1)  # time to send the error
        while time.monotonic() < self.end_at - min(0.3, self.seconds / 4):
            await asyncio.sleep(0.05)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # the client does not read


def serve(
    app: FastAPI,
    worker: GenerationWorker,
    bound: socket.socket,
    shutdown_seconds: float,
    announce: Callable[[], None],
) -> NoReturn:
    """Serve until a signal, then end the process: with status 0, after Ctrl-C with 130.

    Raises:
        SettingsError: Another program has taken the port meanwhile.
    """
    Connection.most = most_connections()
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(shutdown_seconds) + 2,
    )
    server = Server(config, worker, shutdown_seconds, announce)
    # uvicorn raises the signal again after its clean stop
    signal.signal(signal.SIGTERM, lambda *_: None)
    address, status = bound.getsockname(), 0
    try:
        server.run([bound])
    except KeyboardInterrupt:
        status = INTERRUPTED
    except OSError as error:
        if server.started:
            raise
        raise _address_error(address[0], address[1], error) from error
    worker.close(max(server.end_at - time.monotonic(), 0.2))
    if status:
        print("\nstopped.", file=sys.stderr)
    sys.stdout.flush()
    # Python's own exit would free the model for seconds, and must not run during one of its steps,
    # which cannot be interrupted
    os._exit(status)
