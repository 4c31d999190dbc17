"""A stand-in for pretrain_sorted.py in tests of launchers: steps, log and stop signals, no torch.

Rank 0 writes save/metrics.jsonl and, after a stop signal, save/stopped.json, as the trainer does.
"""

import json
import os
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

STEP_SECONDS = 0.02


def main(arguments: list[str]) -> None:
    """Run steps until --train-iters or a signal."""
    [*_, number] = [int(value) for flag, value in pairwise(arguments) if flag == "--train-iters"]
    first, save = os.environ["RANK"] == "0", Path("save")
    save.mkdir(exist_ok=True)
    signals = []
    for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(one, lambda number, frame: signals.append(signal.Signals(number).name))
    for step in range(1, number + 1):
        time.sleep(STEP_SECONDS)
        if first:
            with open(save / "metrics.jsonl", "a", encoding="utf-8") as metrics:
                metrics.write(json.dumps({"step": step}) + "\n")
        if signals:
            if first:
                stop = {"step": step, "train_iters": number, "reason": signals[0]}
                (save / "stopped.json").write_text(json.dumps(stop), encoding="utf-8")
            return


if __name__ == "__main__":
    main(sys.argv[1:])
