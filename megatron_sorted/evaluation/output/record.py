"""The files of an evaluation, written after each measurement so that a failure loses nothing."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from megatron_sorted.errors import DataError
from megatron_sorted.files import write_text_atomically
from megatron_sorted.reading.json_text import read_json_object

NAME, UNFINISHED = "evaluation", ".unfinished"


class Record:
    """The files ``evaluation.json`` and ``answers_NAME.jsonl`` of an evaluation.

    Until all is measured the first has ``"unfinished": true``. The results of an earlier evaluation
    in the same folder stay until this one is finished; until then the names of its files contain
    ``.unfinished``.

    Attributes:
        kept: The file with the measurements so far; None before the first one.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._ending = UNFINISHED if _is_finished(self._path("")) else ""
        self.kept: Path | None = None

    def _path(self, ending: str) -> Path:
        return self._folder / f"{NAME}{ending}.json"

    def keep(self, results: dict, answers: Mapping[str, str]) -> None:
        """Write the measurements so far."""
        self._write({"unfinished": True, **results}, answers, self._ending)
        self.kept = self._path(self._ending)

    def finish(self, results: dict, answers: Mapping[str, str]) -> None:
        """Write all measurements, and remove unfinished files."""
        self._write(results, answers, "")
        for path in (
            self._path(UNFINISHED),
            *(self._folder / f"answers_{name}{UNFINISHED}.jsonl" for name in answers),
        ):
            path.unlink(missing_ok=True)

    def _write(self, results: dict, answers: Mapping[str, str], ending: str) -> None:
        for name, lines in answers.items():
            write_text_atomically(self._folder / f"answers_{name}{ending}.jsonl", lines)
        write_text_atomically(
            self._path(ending), json.dumps(results, indent=2, ensure_ascii=False) + "\n"
        )


def _is_finished(path: Path) -> bool:
    """Return whether the file exists, unless it is known to be unfinished."""
    if not os.path.lexists(path):
        return False
    try:
        return not read_json_object(path).get("unfinished", False)
    except DataError:
        return True
