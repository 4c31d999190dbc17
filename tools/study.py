"""The same as ``python -m lab.study``."""

from entry import run

if __name__ == "__main__":
    run("lab.study")
