"""The same as ``python -m lab.prove_decoding``."""

from entry import run

if __name__ == "__main__":
    run("lab.prove_decoding")
