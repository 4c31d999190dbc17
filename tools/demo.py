"""The same as ``python -m lab.demo``."""

from entry import run

if __name__ == "__main__":
    run("lab.demo")
