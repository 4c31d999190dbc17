"""The same as ``python -m lab.make_cldr_questions``."""

from entry import run

if __name__ == "__main__":
    run("lab.make_cldr_questions")
