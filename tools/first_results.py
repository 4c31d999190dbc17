"""The same as ``python -m lab.first_results``."""

from entry import run

if __name__ == "__main__":
    run("lab.first_results")
