"""A server of a soak as a process: its start, its memory and open files, its counts, its end."""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from lab.reliability.soak.client import Client
from megatron_sorted.errors import PlatformError
from megatron_sorted.reading.text_file import split_lines

ADDRESS = "http://127.0.0.1:"
PREFIX = "megatron_sorted_"
OWNERS = ("one", "two", "three")


def write_keys(path: Path) -> list[str]:
    """Write the keys of `OWNERS` into a file, and return them."""
    keys = [f"soak-key-of-{owner}-0123456789" for owner in OWNERS]
    lines = (f"{owner} {key}\n" for owner, key in zip(OWNERS, keys, strict=True))
    path.write_text("".join(lines), encoding="utf-8")
    return keys


@dataclass(frozen=True)
class ProcessUsage:
    """What a process uses.

    Attributes:
        memory: Resident memory in MB.
        files, threads: Numbers of open files and of threads.
    """

    memory: float
    files: int
    threads: int


class Served:
    """A running server; what it writes to standard error stands in a log.

    Args:
        command: The command that serves.
        log: The log.
        environment: Environment of the process.

    Attributes:
        pid: The process that serves, which may be a child of the one that was started.

    Raises:
        PlatformError: It has ended before clients could connect.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]):
        self.log = log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        for line in self.process.stdout:
            if ADDRESS in line:
                self.port = int(line.partition(ADDRESS)[2].partition("/")[0])
                self.pid = _listener(self.port) or self.process.pid
                return
        self.kill()
        raise PlatformError(
            f"the server ended with status {self.process.returncode}. Correct what {log} says: "
            f"{log.read_text(errors='replace')[-800:]}"
        )

    def kill(self) -> None:
        """End what was started with SIGKILL, unless it has ended."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def stop(self, seconds: float) -> int:
        """End it with SIGTERM and return its status.

        Raises:
            subprocess.TimeoutExpired: It took longer.
        """
        self.process.terminate()
        status = self.process.wait(seconds)
        self.process.stdout.close()
        return status

    async def model_name(self, key: str) -> str:
        """Return the model's name for clients."""
        client = Client(self.port, {"Authorization": f"Bearer {key}"})
        return (await client.get("/v1/models")).last["data"][0]["id"]

    def usage(self) -> ProcessUsage:
        """Return what the process uses now."""
        folder = Path(f"/proc/{self.pid}")
        lines = split_lines(folder.joinpath("status").read_text())
        values = {name: value.split() for name, _, value in (one.partition(":") for one in lines)}
        files = len(list(folder.joinpath("fd").iterdir()))
        return ProcessUsage(int(values["VmRSS"][0]) / 1024, files, int(values["Threads"][0]))


def _listener(port: int) -> int | None:
    """Return the process that listens on a port of this machine."""
    return next(
        (
            one.pid
            for one in psutil.net_connections("tcp4")
            if one.status == psutil.CONN_LISTEN and one.laddr.port == port
        ),
        None,
    )


async def read_counts(client: Client) -> dict[str, float]:
    """Return the server's counts by their names in `BatchingCounts`.

    Raises:
        PlatformError: The server has no metrics.
    """
    answer = await client.get("/metrics")
    if answer.status != 200:
        raise PlatformError(f"/metrics: status {answer.status}: {answer.message}")
    counts = {}
    for line in split_lines(answer.last["text"]):
        name, _, value = line.rpartition(" ")
        if name.startswith(PREFIX) and "{" not in name:
            counts[name.removeprefix(PREFIX).removesuffix("_total")] = float(value)
    return counts
