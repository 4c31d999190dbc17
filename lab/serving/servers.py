"""Server processes: started, stopped, and frozen while another one is measured."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.errors import PlatformError

START_SECONDS = 240.0
STOP_SECONDS = 10.0
LAST_PART = 800
"""Characters of a log that an error shows."""


@dataclass(frozen=True)
class Launch:
    """How a server is started.

    Attributes:
        name: Name of its log.
        command: The command; "PORT" stands for the port.
        folder: Working directory.
        variables: Further environment variables.
        health: Path that answers with status 200 when the server is ready.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    variables: tuple[tuple[str, str], ...] = ()
    health: str = "/health"


class Server:
    """A running server with all its processes.

    Args:
        launch: How it is started.
        logs: Folder of its log.

    Raises:
        PlatformError: It ended, or was not ready in time.
    """

    def __init__(self, launch: Launch, logs: Path):
        self.launch = launch
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = logs / f"{launch.name.replace(' ', '_').replace('/', '_')}.log"
        command = [str(self.port) if word == "PORT" else word for word in launch.command]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=launch.folder, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, **dict(launch.variables)}, start_new_session=True,
            )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def cpu_seconds(self) -> float:
        """Return the processor time that its processes have used so far."""
        ticks = 0
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    text = (entry / "stat").read_text(encoding="utf-8", errors="replace")
                    fields = text.rpartition(")")[2].split()
                    if int(fields[2]) == self.process.pid:  # the process group
                        ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def freeze(self) -> None:
        """Halt its processes, so that an idle server costs the others nothing."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let its processes run."""
        self._send(signal.SIGCONT)

    def stop(self) -> None:
        """End its processes."""
        self.thaw()
        self._send(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        self._send(signal.SIGKILL)
        self.process.wait()

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise PlatformError(
                    f"{self.launch.name} ended with status {self.process.returncode}. Correct "
                    f"what its log says: {self._last_part()}"
                )
            if self._is_ready():
                return
            time.sleep(0.1)
        raise PlatformError(
            f"{self.launch.name} was not ready within {START_SECONDS:g} seconds. Its log ends: "
            f"{self._last_part()}"
        )

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", self.launch.health)
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False  # it does not listen yet
        finally:
            connection.close()

    def _last_part(self) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace").strip()
        return text[-LAST_PART:]


class Servers:
    """The servers of a measurement: contenders with one launch share a process."""

    def __init__(self, logs: Path):
        self.logs = logs
        self.running: dict[Launch, Server] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def keep_only(self, launches: set[Launch]) -> None:
        """End all servers but these."""
        for launch in [one for one in self.running if one not in launches]:
            self.running.pop(launch).stop()

    @contextlib.contextmanager
    def turn_of(self, launch: Launch) -> Iterator[Server]:
        """Yield a server, started at its first turn and frozen after each.

        Raises:
            PlatformError: It cannot be started.
        """
        if launch not in self.running:
            self.running[launch] = Server(launch, self.logs)
        server = self.running[launch]
        server.thaw()
        try:
            yield server
        finally:
            server.freeze()
