"""Imports libraries in processes of their own: one that fails, crashes or hangs is a finding and not the doctor's end."""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from megatron_sorted.command_line import IS_CHECKOUT, ROOT, own_module


def training_path() -> list[str]:
    """Return the folders from which a training run imports.

    The folder of a checkout comes first, as Python puts that of ``pretrain_sorted.py`` there; an installed package stands where
    it is on the path.
    """
    path = sys.path[1:]
    return [str(ROOT), *path] if IS_CHECKOUT and str(ROOT) not in path else path


@dataclass(frozen=True)
class Probe:
    """What became of an import.

    Attributes:
        facts: What the library said; None if it could not be imported.
        errors: The error and those that caused it, outermost first; none if it was imported.
    """

    facts: Mapping[str, Any] | None = None
    errors: tuple[str, ...] = field(default=())

    @property
    def error(self) -> str:
        """Return the error that began it, without line breaks."""
        return " ".join(self.errors[-1].split()) if self.errors else ""


def run_module(
    name: str, words: Sequence[object], environment: Mapping[str, str], limit_seconds: float
) -> tuple[str, str]:
    """Run a module of this package, which imports what a training run would; return what it printed and how it ended."""
    command, environment = own_module(name, *words, environment=environment)
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit_seconds,
            check=False,
            errors="replace",
        )
    except subprocess.TimeoutExpired as late:
        return (late.stdout or b"").decode(
            errors="replace"
        ), f"did not end within {limit_seconds:.0f} s"
    if done.returncode < 0:
        return done.stdout, f"crashed with {signal.Signals(-done.returncode).name}"
    lines = done.stderr.strip().splitlines()
    return done.stdout, lines[
        -1
    ] if lines else f"ended with status {done.returncode} without a word"


def probe(
    names: Sequence[str], environment: Mapping[str, str], limit_seconds: float
) -> list[Probe]:
    """Return what becomes of importing libraries one after another in one process, as a training run would.

    Args:
        names: Keys of ``devices.probe.FACTS``.
        environment: The process's environment.
        limit_seconds: Time after which it is ended.
    """
    printed, end = run_module(
        "megatron_sorted.doctor.devices.probe", names, environment, limit_seconds
    )
    found = []
    for line in printed.splitlines():
        try:
            answer = json.loads(line)
            found.append(Probe(answer.get("facts"), tuple(answer.get("errors", ()))))
        except ValueError:  # what a library printed from outside Python
            continue
    # what it was at when it ended is to blame; what would have come after it was not tried
    return [*found, *[Probe(errors=(end,))] * (len(names) - len(found))]


def probe_all(
    names: Sequence[str], environment: Mapping[str, str], limit_seconds: float
) -> dict[str, Probe]:
    """Return what becomes of several imports, tried side by side; megatron in the process of torch, which takes most of its time.

    torch, where it cannot be imported, is tried once more without backends that load themselves: "torch alone".
    """
    together = [("torch", "megatron"), *((name,) for name in names)]
    with ThreadPoolExecutor(max_workers=len(together)) as pool:
        running = [
            (group, pool.submit(probe, group, environment, limit_seconds)) for group in together
        ]
        found = {
            name: one
            for group, future in running
            for name, one in zip(group, future.result(), strict=True)
        }
    if found["torch"].facts is None:
        alone = {**environment, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        found["torch alone"] = probe(("torch",), alone, limit_seconds)[0]
    return found
