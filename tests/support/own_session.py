"""Tests that need a package and a session of their own, and are skipped in others."""

import importlib.util
import os
from pathlib import Path

import pytest


def why_not(
    config: pytest.Config, folder: Path, package: str, missing: str, target: str, variable: str
) -> str | None:
    """Return why the tests of a folder are left out of a session; None where they are run.

    Args:
        config: The session.
        folder: The folder.
        package: Module that they need.
        missing: What to print where it is not installed.
        target: Name of the target of make that runs them.
        variable: Environment variable that requests them.

    Raises:
        UsageError: They are asked for and cannot be run.
    """
    requested = [
        Path(config.invocation_params.dir, word.split("::")[0]).resolve() for word in config.args
    ]
    reason = None
    if importlib.util.find_spec(package) is None:
        reason = f"{missing}: make {target} installs it, and runs them"
    elif not all(path.is_relative_to(folder) for path in requested):
        reason = f"they need a session of their own: make {target} runs them"
    if reason and variable in os.environ:
        raise pytest.UsageError(f"{variable} asks for tests/{folder.name}: {reason}")
    return reason


def skip_all(items: list[pytest.Item], folder: Path, reason: str | None) -> None:
    """Mark the tests of a folder as skipped, if there is a reason."""
    for item in items if reason else ():
        if item.path.is_relative_to(folder):
            item.add_marker(pytest.mark.skip(reason=reason))
