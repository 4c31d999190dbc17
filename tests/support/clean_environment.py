"""The environment in which tests start programs.

It lacks what other tests have set in this process and what a developer's shell has.
"""

import os

OURS = ("PATH", "HOME", "TMPDIR", "MEGATRON_SORTED_CACHE")


def clean_environment(**more: object) -> dict[str, str]:
    """Return the variables that locate programs and files, and ``more``."""
    return {
        **{name: os.environ[name] for name in OURS if name in os.environ},
        **{name: str(value) for name, value in more.items()},
    }
