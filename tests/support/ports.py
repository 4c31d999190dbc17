"""Servers of tests: ports that nobody listens on, and answers of a server that may still be starting."""

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request


def free_port() -> int:
    """Return a port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until_it_answers(server: subprocess.Popen, port: int, path: str, body: bytes | None = None, seconds: float = 60) -> dict:
    """Return a server's answer in JSON, asked for again until there is one.

    Raises:
        AssertionError: The server has ended.
        URLError: There was no answer within ``seconds``.
    """
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"content-type": "application/json"})
    until = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                return json.load(answer)
        except urllib.error.URLError:
            assert server.poll() is None, f"the server has ended with {server.returncode}"
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
