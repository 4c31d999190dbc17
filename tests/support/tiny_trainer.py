"""Stands in for pretrain_sorted.py where a test is about launchers: steps, their log, saving when told to stop; no torch.

Rank 0 writes save/metrics.jsonl and, told to stop, save/stopped.json, as the trainer does.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

STEP_SECONDS = 0.02


def main(words: list[str]) -> None:
    """Run steps until --train-iters or a signal."""
    number = [int(words[place + 1]) for place, word in enumerate(words) if word == "--train-iters"]
    first, save = os.environ["RANK"] == "0", Path("save")
    save.mkdir(exist_ok=True)
    told = []
    for which in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(which, lambda number, frame: told.append(signal.Signals(number).name))
    for step in range(1, number[-1] + 1):
        time.sleep(STEP_SECONDS)
        if first:
            with open(save / "metrics.jsonl", "a", encoding="utf-8") as metrics:
                metrics.write(json.dumps({"step": step}) + "\n")
        if told:
            if first:
                word = {"step": step, "train_iters": number[-1], "reason": told[0]}
                (save / "stopped.json").write_text(json.dumps(word), encoding="utf-8")
            return


if __name__ == "__main__":
    main(sys.argv[1:])
