"""Warnings whose cause is our own code are errors in tests, in every process of a test run.

pyproject.toml sets the same for pytest's own process. PYTHONWARNINGS cannot: it names one module,
and no package. So commands that a test starts without a preloaded server only print them.
"""

import warnings

OURS = r"(megatron_sorted|lab)\b"
"""The modules, as a pattern for the beginning of their names."""


def raise_own_warnings() -> None:
    """Make warnings of our own modules errors in this process and its forks.

    A file that was not closed is reported in whatever function runs when it is collected, so that
    it says nothing about that function.
    """
    warnings.filterwarnings("error", module=OURS)
    warnings.filterwarnings("ignore", category=ResourceWarning)


def warn_as(module: str, category: type[Warning]) -> None:
    """Warn as a line of ``module`` would."""
    warnings.warn_explicit("to be mended", category, "file.py", 1, module)
