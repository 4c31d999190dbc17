"""The same as ``python -m megatron_sorted.launching.facts``, for the launchers in slurm/."""

from entry import run

if __name__ == "__main__":
    run("megatron_sorted.launching.facts")
