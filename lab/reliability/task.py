"""The training that is killed, and the torchrun job that runs it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil

from lab.reliability.processes import environment, torchrun
from megatron_sorted.installation import ROOT

# With dropout and drawn exits, a resume that loses random state or the step count shows in the
# first loss after it.
SETTINGS = """\
num-layers: 6
hidden-size: 192
num-attention-heads: 6
seq-length: 64
exit-layer-nums: [1, 2, 3, 5]
exit-sampling: uniform
num-sampled-exits: 3
hidden-dropout: 0.1
attention-dropout: 0.1
device: cpu
pipeline-model-parallel-size: 2
micro-batch-size: 4
global-batch-size: 16
data-path: [data/task_text_document]
tokenizer-model: data/task_tokenizer.model
split: 100,0
lr: 1.0e-3
lr-warmup-iters: 5
log-interval: 1
save-interval: 3
save-retain: 3
exit-on-missing-checkpoint: false
"""


def write_task(folder: Path) -> None:
    """Write data, tokenizer and ``run.yaml`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = (
        {"instruction": f"Add {i % 97} and {i % 89}", "output": f"The sum is {i % 97 + i % 89}."}
        for i in range(2000)
    )
    (folder / "task.jsonl").write_text(
        "".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8"
    )
    subprocess.run(
        [
            *(sys.executable, "-m", "megatron_sorted", "prepare", "--input", "task.jsonl"),
            *("--output-prefix", "data/task", "--seq-length", "64", "--train-tokenizer", "300"),
            "--overwrite",
        ],
        cwd=folder,
        env=environment(),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (folder / "run.yaml").write_text(SETTINGS, encoding="utf-8")


class RunningJob:
    """A torchrun job of the task, in a session of its own so that all of it can be killed."""

    def __init__(
        self,
        folder: Path,
        name: str,
        steps: int,
        num_processes: int,
        settings: list[str],
        max_restarts: int = 0,
    ):
        self.save, self.log = folder / name, folder / f"{name}.log"
        command = [
            *torchrun(num_processes),
            *f"--max-restarts {max_restarts} --monitor-interval 0.1".split(),
            str(ROOT / "pretrain_sorted.py"),
            *f"--config run.yaml --train-iters {steps} --save {name} --load {name}".split(),
            *settings,
        ]
        with open(self.log, "a", encoding="utf-8") as log:
            self.process = psutil.Popen(
                command,
                cwd=folder,
                env=environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def finished(self) -> bool:
        """Return whether the job has succeeded.

        Raises:
            RuntimeError: It has failed.
        """
        status = self.process.poll()
        if status:
            raise RuntimeError(
                f"the job ended with status {status}; the end of {self.log}:\n"
                f"{self.log.read_text()[-3000:]}"
            )
        return status == 0

    def wait_until_finished(self, seconds: float) -> None:
        """Wait until the job has succeeded.

        Raises:
            RuntimeError: It failed.
            TimeoutError: It took longer.
        """
        until = time.monotonic() + seconds
        while not self.finished():
            if time.monotonic() > until:
                self.kill()
                raise TimeoutError(f"the job did not end within {seconds:.0f} s; see {self.log}")
            time.sleep(0.1)

    def ranks(self) -> list[psutil.Process]:
        """Return the processes that train."""
        try:
            children = self.process.children()
            return [
                child for child in children if "pretrain_sorted.py" in " ".join(child.cmdline())
            ]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """Kill torchrun and all ranks."""
        for process in [self.process, *self.process.children(recursive=True)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()
