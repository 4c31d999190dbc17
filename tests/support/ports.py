"""Servers of tests: free ports, and answers of a server that may still be starting."""

import json
import random
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import suppress

CHANCE = random.SystemRandom()  # other test runs on this machine must not draw the same ports


def free_port() -> int:
    """Return a free port of this host.

    It lies below those that the kernel gives to outgoing connections (from 32768 on), so that none
    takes it before it is used, and below those of SLURM jobs (from 20000 on).
    """
    while True:
        port = CHANCE.randrange(10240, 20000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def until_it_answers(
    server: subprocess.Popen, port: int, path: str, body: bytes | None = None, seconds: float = 60
) -> dict:
    """Return a server's answer in JSON, asked for again until there is one.

    Raises:
        AssertionError: The server has ended.
        HTTPError: The server refuses the request.
        URLError: There was no answer within ``seconds``.
    """
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", body, {"content-type": "application/json"}
    )
    until = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                return json.load(answer)
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:  # not listening yet
            assert server.poll() is None, f"the server has ended with {server.returncode}"
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
