"""Imports of libraries in processes of their own: one that fails, crashes or hangs is a finding."""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from megatron_sorted.installation import IS_CHECKOUT, ROOT, own_module


def training_path() -> list[str]:
    """Return the folders from which a training run imports.

    A checkout's folder comes first, as for ``pretrain_sorted.py``; an installed package stays where
    it is on the path.
    """
    path = sys.path[1:]
    return [str(ROOT), *path] if IS_CHECKOUT and str(ROOT) not in path else path


@dataclass(frozen=True)
class Probe:
    """The result of importing a library.

    Attributes:
        facts: Facts about the library; None if it could not be imported.
        errors: The error and its causes, outermost first; none if it was imported.
    """

    facts: Mapping[str, Any] | None = None
    errors: tuple[str, ...] = ()

    @property
    def error(self) -> str:
        """Return the root cause, without line breaks."""
        return " ".join(self.errors[-1].split()) if self.errors else ""


def run_module(
    name: str, arguments: Sequence[object], environment: Mapping[str, str], limit_seconds: float
) -> tuple[str, str]:
    """Run a module of this package with a time limit; return what it printed and how it ended.

    It imports what a training run would import.
    """
    command, environment = own_module(name, *arguments, environment=environment)
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
        printed = (late.stdout or b"").decode(errors="replace")
        return printed, f"did not end within {limit_seconds:.0f} s"
    if done.returncode < 0:
        return done.stdout, f"crashed with {signal.Signals(-done.returncode).name}"
    lines = done.stderr.strip().splitlines()
    return done.stdout, lines[-1] if lines else f"ended with status {done.returncode}, no message"


def probe(
    names: Sequence[str], environment: Mapping[str, str], limit_seconds: float
) -> list[Probe]:
    """Import libraries one after another in one process, as a training run would.

    Args:
        names: Keys of ``devices.probe.FACTS``.
        environment: The process's environment.
        limit_seconds: Time after which the process is ended.
    """
    printed, end = run_module(
        "megatron_sorted.doctor.devices.probe",
        names,
        {**environment, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        limit_seconds,
    )
    results = []
    for line in printed.splitlines():
        try:
            answer = json.loads(line)
        except ValueError:  # printed by a library from outside Python
            continue
        results.append(Probe(answer.get("facts"), tuple(answer.get("errors", ()))))
    # The library being imported when the process ended is to blame; later ones were not tried.
    return [*results, *[Probe(errors=(end,))] * (len(names) - len(results))]


def probe_all(
    names: Sequence[str], environment: Mapping[str, str], limit_seconds: float
) -> dict[str, Probe]:
    """Import torch, megatron-core and ``names`` in parallel; megatron-core in torch's process."""
    groups = [("torch", "megatron"), *((name,) for name in names)]
    with ThreadPoolExecutor(max_workers=len(groups)) as pool:
        results = pool.map(lambda group: probe(group, environment, limit_seconds), groups)
        return {
            name: result
            for group, group_results in zip(groups, results, strict=True)
            for name, result in zip(group, group_results, strict=True)
        }
