"""The other side of ``worker``: starts vLLM's Python, sends jobs, reads answers."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from megatron_sorted.errors import PlatformError
from megatron_sorted.reading.json_text import parse_json

ROOT = Path(__file__).resolve().parents[2]
JOB_SECONDS = 3600.0
LAST_PART = 600
"""Characters of a log that an error shows."""


class VllmProcess:
    """vLLM's Python with the project's files on its path; started at the first job.

    Args:
        python: An interpreter that can import vLLM.
        folder: Folder of its log and answers.
        threads: Number of threads.
    """

    def __init__(self, python: Path, folder: Path, threads: int):
        self.python, self.folder, self.threads = python, folder, threads
        self.process: subprocess.Popen | None = None

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a job.

        Raises:
            PlatformError: vLLM ended, refused, or took too long.
        """
        if self.process is None:
            self._start()
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended; its log says why
        end, line = time.monotonic() + JOB_SECONDS, ""
        while not line.endswith("\n"):
            line += self.answers.readline()
            if not line and (self.process.poll() is not None or time.monotonic() > end):
                self.stop()
                raise PlatformError(
                    f"{self.python} ended, or wrote nothing. Its log: {self._last_part()}"
                )
            time.sleep(0.02)
        answer = parse_json(line, "answer of vLLM")
        if "error" in answer:
            raise PlatformError(f"vLLM: {answer['error'][:LAST_PART]} Its log says more.")
        return answer

    def stop(self) -> None:
        """End it with its children."""
        if self.process is None:
            return
        process, self.process = self.process, None
        with contextlib.suppress(OSError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.answers.close()

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log, path = self.folder / "vllm.log", self.folder / "answers.jsonl"
        path.write_text("", encoding="utf-8")
        self.answers = path.open(encoding="utf-8")
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(self.threads)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [self.python, "-m", "lab.vllm_proof.worker", path], cwd=self.folder, text=True,
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=variables,
                start_new_session=True,
            )  # fmt: skip

    def _last_part(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace").strip()[-LAST_PART:]
