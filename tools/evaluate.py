"""Run ``megatron-sorted evaluate`` from a clone."""

import runpy
from pathlib import Path

run = runpy.run_path(str(Path(__file__).with_name("entry.py")))["run"]

if __name__ == "__main__":
    run("megatron_sorted", "evaluate")
