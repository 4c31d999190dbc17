"""Steps: commands that are shown before they run, and that run once until they have succeeded."""

import hashlib
import json
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

from lab.reliability.processes import environment
from megatron_sorted.errors import SortedError
from megatron_sorted.files import write_text_atomically
from megatron_sorted.installation import ROOT

PYTHON = "python"
OURS = (PYTHON, "-m", "megatron_sorted")
"""The first word of a command is replaced by the interpreter that runs this.

So records of finished steps are valid on other machines too.
"""


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
        makes: Files or folders that show that the step is finished.
        clears: Folders that are removed before it runs.
        needs: Names of earlier steps; when one of them has changed, this one runs again.
        reads: Files that no step makes; when the content of one has changed, the step runs again.
        seconds: The expected duration; 0 if unknown.
        always: Whether it also runs when it is finished.
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
    """Runs steps and remembers which are finished.

    Commands run in the project's folder, and their output goes to the terminal. With ``jobs``, this
    many of one call of `run` run at a time, in any order, and their output goes to files in
    ``folder``/logs.
    """

    def __init__(self, folder: Path, total: int, jobs: int | None = None):
        self._folder, self._records = folder, folder / "finished_steps"
        self._number, self._total, self._jobs = 0, total, jobs
        self._keys: dict[str, str] = {}
        self.steps: list[Step] = []

    def run(self, steps: Sequence[Step]) -> None:
        """Run those steps that are not finished.

        Raises:
            StepError: A command failed, or succeeded without writing its files. Steps that
                run at that time are completed.
        """
        self._records.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self._jobs or 1) as pool:
            ends = []
            for step in steps:
                self._number += 1
                self.steps.append(step)
                key = self._keys[step.name] = self._key(step)
                title = f"step {self._number} of {self._total}, {step.name}"
                record = self._records / step.name
                if (
                    record.is_file()
                    and record.read_text(encoding="utf-8") == key
                    and not _missing(step)
                    and not step.always
                ):
                    print(f"== {title}: finished before, skipped (--fresh repeats it)", flush=True)
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
        """Return a hash of everything that the step's result depends on."""
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in step.reads]
        parts = [step.command, [self._keys[name] for name in step.needs], digests]
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
        command = (
            [sys.executable, *step.command[1:]] if step.command[0] == PYTHON else list(step.command)
        )
        log = self._folder / "logs" / f"{step.name}.log" if self._jobs else None
        if log:
            log.parent.mkdir(exist_ok=True)
        with open(log, "wb") if log else nullcontext() as output:
            ended = subprocess.run(
                command,
                cwd=ROOT,
                env=environment(),
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
                "The same command again continues there.",
                code,
            )
        if missing := _missing(step):
            raise StepError(
                f"{title}: succeeded but did not write {', '.join(missing)}. Report this as a bug."
            )
        done = f"done after {time.monotonic() - began:.0f} s"
        print(f"   {title}: {done}" if self._jobs else f"\n   {done}", flush=True)


def _missing(step: Step) -> list[str]:
    """Return the files and folders that a step should have made but did not."""
    return [str(path) for path in step.makes if not (ROOT / path).exists()]
