"""The environment in which tests start programs: not what other tests have set in this process, nor what a developer's shell has."""

import os

OURS = ("PATH", "HOME", "TMPDIR")


def clean_environment(**more: object) -> dict[str, str]:
    """Returns variables that say where programs and files are, and ``more``."""
    return {
        **{name: os.environ[name] for name in OURS if name in os.environ},
        **{name: str(value) for name, value in more.items()},
    }
