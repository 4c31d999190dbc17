"""A headless Chromium, driven by its own program through the W3C's WebDriver protocol."""

import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.ports import free_port

PROGRAMS = ("chromium", "chromedriver")
needs_browser = pytest.mark.skipif(
    not all(map(shutil.which, PROGRAMS)),
    reason="chromedriver missing: apt-get install chromium chromium-driver",
)
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # root has none
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--window-size=1280,800",
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key of an element's id, by the standard."""
PATIENCE = 120
RIGHT, END, CONTROL_ENTER, ESCAPE = "\ue014", "\ue010", "\ue009\ue007", "\ue00c"
"""Keys, by the standard's code points."""


class Browser:
    """A session of a browser.

    Args:
        place: Address of the driver.
        folder: Folder for the browser's profile.
    """

    def __init__(self, place: str, folder: Path):
        self.place = f"{place}/session"
        options = {
            "binary": shutil.which("chromium"),
            "args": [*ARGUMENTS, f"--user-data-dir={folder / 'profile'}"],
        }
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            "timeouts": {"script": 1000 * PATIENCE},
        }
        session = self.send("", capabilities={"alwaysMatch": wanted})
        self.place += f"/{session['sessionId']}"

    def send(self, path: str, method: str = "POST", **body: Any) -> Any:
        """Return the value of the driver's answer to a command."""
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.place + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def open(self, address: str) -> None:
        """Open a page."""
        self.send("/url", url=address)

    def run(self, script: str, *arguments: object) -> Any:
        """Return the value of a script, or of its promise."""
        return self.send("/execute/sync", script=script, args=arguments)

    def until(self, condition: str) -> None:
        """Wait until a condition of JavaScript holds."""
        self.run(
            "return new Promise((done) => { const look = () => "
            f"({condition}) ? done() : setTimeout(look, 10); look(); }});"
        )

    def find(self, selector: str) -> str:
        """Return the path of an element's commands."""
        element = self.send("/element", using="css selector", value=selector)
        return f"/element/{element[ELEMENT]}"

    def click(self, selector: str) -> None:
        """Click an element, as a user's mouse does."""
        self.send(f"{self.find(selector)}/click")

    def type(self, selector: str, keys: object, clear: bool = True) -> None:
        """Type into an element, by default in place of what is there."""
        element = self.find(selector)
        if clear:
            self.send(f"{element}/clear")
        self.send(f"{element}/value", text=str(keys))

    def emulate(self, command: str, **parameters: object) -> None:
        """Give one of the browser's own commands for emulation."""
        self.send("/goog/cdp/execute", cmd=f"Emulation.{command}", params=parameters)

    def log(self, kind: str) -> list[dict]:
        """Return what was logged since the last call."""
        return self.send("/se/log", type=kind)


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """Yield a browser whose files lie in a folder; it is ended afterwards."""
    # With port 0 it takes one that is free for IPv6, and ends if it is in use for IPv4.
    port = free_port()
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "HOME": str(folder), "TMPDIR": str(folder)},
    )
    browser = None
    try:
        printed = ""
        while "started successfully" not in printed:
            line = driver.stdout.readline()
            assert line, f"the driver ended: {printed}"
            printed += line
        browser = Browser(f"http://127.0.0.1:{port}", folder)
        yield browser
    finally:
        if browser is not None:
            browser.send("", "DELETE")
        driver.kill()
        driver.communicate()
