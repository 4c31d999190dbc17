"""The same as ``megatron-sorted train``, for torchrun in a clone."""

from megatron_sorted.commands import run

if __name__ == "__main__":
    run("train")
