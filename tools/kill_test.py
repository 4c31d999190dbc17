"""The same as ``python -m lab.kill_test``."""

from entry import run

if __name__ == "__main__":
    run("lab.kill_test")
