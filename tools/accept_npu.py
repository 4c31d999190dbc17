"""The same as ``python -m lab.accept_npu``."""

from entry import run

if __name__ == "__main__":
    run("lab.accept_npu")
