"""One settings field: a dataclass field that carries its line of help."""

from dataclasses import field
from typing import Any


def setting(default: Any, help_text: str) -> Any:
    """Returns a dataclass field with ``default`` and the one line that ``--help`` shows for it."""
    return field(default=default, metadata={"help": help_text})
