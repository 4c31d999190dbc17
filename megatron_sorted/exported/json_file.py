"""JSON files beside a model."""

import json
from pathlib import Path

from megatron_sorted.errors import DataError


def read_object(path: Path) -> dict:
    """Returns the object in a JSON file; empty where there is no such file.

    Raises:
        DataError: It is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}). Give an intact directory.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object. Give an intact directory.")
    return value
