"""What tools/prepare_data.py left beside the data: ``P.json``, for ``P_text_document`` and ``P_valid_text_document``."""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.data.tokenizer import Tokenizer
from megatron_sorted.errors import DataError

ENDINGS = ("_valid_text_document", "_text_document")


def summary_path(prefix: str) -> Path | None:
    """Returns the summary of the data at ``prefix``, or None where there is none (data made by another tool, or moved alone)."""
    for ending in ENDINGS:
        path = Path(f"{prefix.removesuffix(ending)}.json")
        if prefix.endswith(ending) and path.is_file():
            return path
    return None


def stored_options(prefix: str) -> dict:
    """Return what the summary of the data at ``prefix`` says, or nothing where there is none.

    Raises:
        DataError: It cannot be read.
    """
    path = summary_path(prefix)
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as the summary of prepared data ({type(error).__name__}: {error}). "
                        "Prepare the data again, or take this file away.") from error
    return found if isinstance(found, dict) else {}


def check_same_tokenizer(prefixes: Sequence[str], tokenizer: Tokenizer, owner: str = "--tokenizer-model is") -> None:
    """Check that no summary names another tokenizer than ``tokenizer``, in whatever form of its vocabulary.

    Raises:
        DataError: One does, or it cannot be read. Its tokens would mean other words, and nothing else would tell.
    """
    for prefix in prefixes:
        path = summary_path(prefix)
        if path is None:
            continue
        try:
            made_with = stored_options(prefix)["tokenizer"]
            name, sha256 = made_with["name"], made_with["sha256"]
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: not readable as the summary of prepared data ({type(error).__name__}: {error}). "
                            "Prepare the data again, or take this file away.") from error
        if sha256 not in tokenizer.hashes:
            raise DataError(f"{prefix}: prepared with tokenizer {name} (sha256 {sha256[:16]}), but {owner} {tokenizer.name} "
                            f"(sha256 {tokenizer.sha256[:16]}). Give the tokenizer the data was prepared with, or prepare it again.")
