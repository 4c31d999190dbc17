"""The process that talks to Weights & Biases for a run; ``wandb_writer`` starts it.

    python -m megatron_sorted.monitoring.wandb_process

It is a separate process because wandb waits: for servers in ``init``, for uploads in ``finish`` and
again when the interpreter ends. Ending one process cuts off all of that. It reads JSON lines on its
standard input, first the run to open, then reports:

    {"mode": "online" | "offline", "init": {...}, ...}
    {"iteration": N, "values": {...}}
    {"close": true}

and answers with JSON lines on its standard output: ``started``, ``failed`` or ``finished``. Its
input also ends when the training process dies; then the run is finished as failed, so that no row
is lost.
"""

import contextlib
import json
import os
import re
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

SECONDS_BETWEEN_CHECKS = 5.0
"""Time between checks that the training process lives.

The input alone does not show it if another process inherited its other end.
"""


class StepNumbers:
    """wandb's step number of each iteration: the iteration itself, as in Megatron, while free.

    wandb drops rows whose step is not above the last one. A run resumed from a checkpoint repeats
    iterations that were reported before the interruption. Their rows get the next free numbers,
    and ``iteration``, the x axis of all charts, is right in every row. Offline no server knows the
    last number, so it is kept in a file beside the run's.

    Args:
        path: The file that keeps the next free number.
        starting_step: The server's next free number.
    """

    def __init__(self, path: Path, starting_step: int):
        self._path, self._iteration = path, None
        with contextlib.suppress(OSError, ValueError):  # a new run has no file
            starting_step = max(starting_step, int(path.read_text(encoding="ascii")))
        self._step = starting_step - 1

    def of(self, iteration: int) -> int:
        """Return the step number of a row; rows of one iteration share it."""
        if iteration != self._iteration:
            self._iteration, self._step = iteration, max(iteration, self._step + 1)
            self._path.write_text(f"{self._step + 1}\n", encoding="ascii")
        return self._step


def reason_of(error: BaseException) -> str:
    """Return an error in one line, without secrets."""
    text = " ".join(str(error).split()) or type(error).__name__
    key = os.environ.get("WANDB_API_KEY")
    if key:
        text = text.replace(key, "***")
    text = re.sub(r"(?<=//)[^/@\s]+@", "***@", text)
    text += "; `pip install wandb` installs it" if isinstance(error, ImportError) else ""
    return text if len(text) <= 300 else text[:297] + "..."


def open_run(start: dict[str, Any]) -> Any:
    """Open a run of wandb whose charts have ``iteration`` as x axis."""
    import wandb

    wanted = {
        "console": "off",
        "silent": True,
        "program": start["program"],
        "init_timeout": start["init_seconds"],
        "finish_timeout": start["finish_seconds"],
        "x_stats_pid": os.getppid(),  # record the trainer's use of memory and devices
        "x_transaction_log_flush_interval": 1.0,  # a node that fails loses this many seconds
    }
    # some versions of wandb have fewer settings
    known = {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}
    run = wandb.init(mode=start["mode"], settings=wandb.Settings(**known), **start["init"])
    run.define_metric("iteration", hidden=True)
    run.define_metric("*", step_metric="iteration")
    return run


def incoming(stream: IO[bytes], trainer: int) -> Iterator[dict[str, Any]]:
    """Yield the messages until the input or the training process (its id: ``trainer``) ends."""
    rest = b""
    while True:
        if not select.select([stream], [], [], SECONDS_BETWEEN_CHECKS)[0]:
            if os.getppid() != trainer:
                return
            continue
        data = os.read(stream.fileno(), 1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from map(json.loads, lines)


def serve(stream: IO[bytes], answers: IO[str]) -> None:
    """Open the run, log the incoming reports and finish the run; wandb's errors are not caught."""

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    messages = incoming(stream, os.getppid())
    start = next(messages)
    run = open_run(start)
    online = start["mode"] == "online"
    directory = Path(run.dir).parent
    steps = StepNumbers(directory.parent / f"next-step-{run.id}.txt", run.starting_step)
    answer(
        started={
            "directory": str(directory),
            "name": run.name,
            "url": run.url if online else None,
            "resumed": bool(run.resumed),
        }
    )
    for message in messages:
        if message.get("close"):
            began = time.monotonic()
            run.finish(exit_code=0)
            answer(
                finished={
                    "complete": time.monotonic() - began < start["finish_seconds"] or not online
                }
            )
            return
        run.log(
            {**message["values"], "iteration": message["iteration"]},
            step=steps.of(message["iteration"]),
        )
    run.finish(exit_code=1)


def main() -> None:
    """Serve the training process, then end without wandb's own waiting at the interpreter's end."""
    # A scheduler signals every process of a job. Training responds; this process continues until
    # its input ends.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    # Keep the pipes as copies: processes that wandb starts inherit, and prints go to, /dev/null.
    stream, answers = (
        os.fdopen(os.dup(0), "rb", buffering=0),
        os.fdopen(os.dup(1), "w", encoding="utf-8"),
    )
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    status = 0
    try:
        serve(stream, answers)
    except BaseException as error:
        status = 1
        with contextlib.suppress(OSError):  # the training process may have ended
            print(json.dumps({"failed": reason_of(error)}), file=answers, flush=True)
    os._exit(status)


if __name__ == "__main__":
    main()
