"""One field of the settings: a dataclass field that carries its line of help; its flag; and the settings as rules see them."""

from dataclasses import field
from typing import Any, Protocol


class AllSettings(Protocol):
    """The fields of every group, as the rules of one group see them: `run.Settings`, which is made of the groups."""

    def __getattr__(self, name: str) -> Any:
        """Return the value of the field ``name``."""


def setting(default: Any, help_text: str) -> Any:
    """Return a dataclass field with ``default`` and the one line that ``--help`` shows for it."""
    return field(default=default, metadata={"help": help_text})


def flag_of(name: str) -> str:
    """Return the flag of a field: ``train_iters`` -> ``--train-iters``."""
    return "--" + name.replace("_", "-")
