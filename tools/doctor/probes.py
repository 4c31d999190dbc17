"""Imports libraries in processes of their own: one that fails, crashes or hangs is a finding and not the doctor's end."""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROBE = Path(__file__).parent / "devices" / "probe.py"


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
        """Returns the error that began it, without line breaks."""
        return " ".join(self.errors[-1].split()) if self.errors else ""


def probe(names: Sequence[str], root: Path, environment: Mapping[str, str], limit_seconds: float) -> list[Probe]:
    """Returns what becomes of importing libraries one after another in one process, as a training run would.

    Args:
        names: Of ``devices.probe.FACTS``.
        root: Folder of the training script, first on the path.
        environment: Of the process.
        limit_seconds: After which it is ended.
    """
    command = [sys.executable, str(PROBE), str(root), *names]
    try:
        done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, timeout=limit_seconds, check=False,
                              errors="replace")
        printed, end = done.stdout, f"ended with status {done.returncode} without a word"
        if done.returncode < 0:
            end = f"crashed with {signal.Signals(-done.returncode).name}"
        elif said := done.stderr.strip().splitlines():
            end = said[-1]
    except subprocess.TimeoutExpired as late:
        printed, end = (late.stdout or b"").decode(errors="replace"), f"did not end within {limit_seconds:.0f} s"
    found = []
    for line in printed.splitlines():
        try:
            answer = json.loads(line)
            found.append(Probe(answer.get("facts"), tuple(answer.get("errors", ()))))
        except ValueError:  # what a library printed from outside Python
            continue
    # what it was at when it ended is to blame; what would have come after it was not tried
    return [*found, *[Probe(errors=(end,))] * (len(names) - len(found))]


def probe_all(names: Sequence[str], root: Path, environment: Mapping[str, str], limit_seconds: float) -> dict[str, Probe]:
    """Returns what becomes of several imports, tried side by side; megatron in the process of torch, which it takes most of its time for.

    torch, where it cannot be imported, is tried once more without backends that load themselves: "torch alone".
    """
    together = [("torch", "megatron"), *((name,) for name in names)]
    with ThreadPoolExecutor(max_workers=len(together)) as pool:
        running = [(group, pool.submit(probe, group, root, environment, limit_seconds)) for group in together]
        found = {name: one for group, future in running for name, one in zip(group, future.result(), strict=True)}
    if found["torch"].facts is None:
        alone = {**environment, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        found["torch alone"] = probe(("torch",), root, alone, limit_seconds)[0]
    return found
