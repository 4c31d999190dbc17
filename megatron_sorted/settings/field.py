"""One field of the settings, its flag, and the settings as the rules of one group see them."""

from collections.abc import Iterable
from dataclasses import field
from typing import Any, Protocol


class AllSettings(Protocol):
    """The fields of all groups, as the rules of one group see them; `run.Settings` is one."""

    def __getattr__(self, name: str) -> Any:
        """Return the value of the field ``name``."""


def setting(default: Any, help_text: str, untested: Iterable[str] = ()) -> Any:
    """Return a dataclass field with ``default`` and the help text that ``--help`` shows for it.

    ``untested`` are values that Megatron-LM has and this program refuses, with that reason.
    """
    return field(default=default, metadata={"help": help_text, "untested": tuple(untested)})


def flag_of(name: str) -> str:
    """Return the flag of a field.

    >>> flag_of("train_iters")
    '--train-iters'
    """
    return "--" + name.replace("_", "-")
