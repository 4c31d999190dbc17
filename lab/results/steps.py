"""Steps: commands that are shown before they run, and that are not run again once they have ended well."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.command_line import ROOT
from megatron_sorted.errors import SortedError
from megatron_sorted.files import write_text_atomically

PYTHON = "python"
OURS = (PYTHON, "-m", "megatron_sorted")
"""First word of a command; the interpreter that runs this takes its place, so that a record holds on other machines too."""


class StepError(SortedError):
    """A step's command failed, or did not write what it should.

    Attributes:
        code: The command's exit code, or 1.
    """

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        makes: Files or folders that show that it is finished.
        clears: Folders that are removed before it runs.
        needs: Names of earlier steps; when one of them has changed, this one runs again.
        reads: Files from outside; when one has other content, it runs again.
        seconds: About how long it takes; 0: nobody says.
        always: Whether it runs though it is finished.
    """

    name: str
    purpose: str
    command: tuple[str, ...]
    makes: tuple[Path, ...]
    clears: tuple[Path, ...] = ()
    needs: tuple[str, ...] = ()
    reads: tuple[Path, ...] = ()
    seconds: int = 0
    always: bool = False


class Runner:
    """Runs steps and remembers which are finished; commands run in the project's folder, their output goes to the terminal.

    With ``jobs``, so many run at a time, in any order among those of one call of `run`, and their output goes to files in ``folder``/logs.
    """

    def __init__(self, folder: Path, total: int, jobs: int | None = None):
        self._folder, self._records, self._total, self._number, self._jobs = (
            folder,
            folder / "finished_steps",
            total,
            0,
            jobs,
        )
        self._keys: dict[str, str] = {}
        self.steps: list[Step] = []

    def run(self, steps: Sequence[Step]) -> None:
        """Run those steps that are not finished.

        Raises:
            StepError: A command failed, or ended well without writing its files. Others that run at the time are let end.
        """
        self._records.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self._jobs or 1) as pool:
            ends = []
            for step in steps:
                self._number += 1
                self.steps.append(step)
                key = self._keys[step.name] = self._key(step)
                title, record = (
                    f"step {self._number} of {self._total}, {step.name}",
                    self._records / step.name,
                )
                if (
                    record.is_file()
                    and record.read_text(encoding="utf-8") == key
                    and not _missing(step)
                    and not step.always
                ):
                    print(
                        f"== {title}: finished before, skipped (--fresh does it again)", flush=True
                    )
                    continue
                record.unlink(missing_ok=True)
                ends.append(pool.submit(self._run_and_record, step, title, record, key))
                if not self._jobs:
                    ends[-1].result()  # a step may need the one before it
            try:
                for end in ends:
                    end.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _run_and_record(self, step: Step, title: str, record: Path, key: str) -> None:
        self._run(step, title)
        write_text_atomically(record, key)

    def _key(self, step: Step) -> str:
        """Return what the step's result depends on, as a hash."""
        outside = [_digest(path) for path in step.reads]
        parts = [step.command, [self._keys[name] for name in step.needs], outside]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _run(self, step: Step, title: str) -> None:
        opening = f"== {title}: {step.purpose}" + (
            f" (about {step.seconds} s)" if step.seconds else ""
        )
        print(
            opening if self._jobs else f"\n{opening}\n   {shlex.join(step.command)}\n", flush=True
        )
        for path in step.clears:
            shutil.rmtree(ROOT / path, ignore_errors=True)
        began = time.monotonic()
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        command = (
            [sys.executable, *step.command[1:]] if step.command[0] == PYTHON else list(step.command)
        )
        log = self._folder / "logs" / f"{step.name}.log" if self._jobs else None
        # One thread: several processes that each take every core slow each other down, and sums keep one order.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        if log:
            log.parent.mkdir(exist_ok=True)
        with open(log, "wb") if log else nullcontext() as output:
            ended = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                check=False,
                stdout=output,
                stderr=output and subprocess.STDOUT,
            )
        code = ended.returncode
        if code != 0:
            if log:
                print(
                    "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]),
                    flush=True,
                )
            raise StepError(
                f"{title}: ended with exit code {code}; the message above says why. "
                "The same command again goes on there.",
                code,
            )
        if missing := _missing(step):
            raise StepError(
                f"{title}: ended well but did not write {', '.join(missing)}. Report this as a bug."
            )
        done = f"done after {time.monotonic() - began:.0f} s"
        print(f"   {title}: {done}" if self._jobs else f"\n   {done}", flush=True)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _missing(step: Step) -> list[str]:
    """Return what a step should have made and is not there."""
    return [str(path) for path in step.makes if not (ROOT / path).exists()]
