"""Run ``megatron-sorted train`` from a clone, for torchrun."""

from megatron_sorted.commands import run

if __name__ == "__main__":
    run("train")
