"""The same as ``python -m lab.bench_rules``."""

from entry import run

if __name__ == "__main__":
    run("lab.bench_rules")
