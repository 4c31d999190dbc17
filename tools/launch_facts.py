"""Run ``python -m megatron_sorted.launching.facts`` from a clone, for the launchers in slurm/."""

import runpy
from pathlib import Path

run = runpy.run_path(str(Path(__file__).with_name("entry.py")))["run"]

if __name__ == "__main__":
    run("megatron_sorted.launching.facts")
