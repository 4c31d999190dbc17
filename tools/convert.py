"""The same as ``megatron-sorted convert``, for those who work in a clone."""

from entry import run

if __name__ == "__main__":
    run("megatron_sorted", "convert")
