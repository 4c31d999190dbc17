"""Documents of several indexed files, numbered consecutively."""

from collections.abc import Sequence

import numpy as np

from megatron_sorted.data.indexed import Indexed, open_indexed
from megatron_sorted.errors import DataError


class Corpus:
    """Documents of one or more indexed files, numbered consecutively.

    ``share`` is the part of each file that is used: (begin, end) as fractions.
    """

    def __init__(self, prefixes: Sequence[str], share: tuple[float, float] = (0.0, 1.0)):
        self._files: list[Indexed] = [open_indexed(prefix) for prefix in prefixes]
        kinds = {file.modes is not None for file in self._files}
        if len(kinds) > 1:
            raise DataError(
                f"--data-path: {', '.join(prefixes)} mix instruction data and plain text, which "
                "are packed differently. Give each a weight (WEIGHT PREFIX WEIGHT PREFIX ...): in "
                "a blend each is packed by itself."
            )
        self.prefixes = tuple(prefixes)
        self.has_modes = kinds == {True}
        self._first = [round(share[0] * file.num_documents) for file in self._files]
        last = [round(share[1] * file.num_documents) for file in self._files]
        self._bounds = np.cumsum([0] + [b - a for a, b in zip(self._first, last, strict=True)])
        self.lengths = np.concatenate(
            [
                f.document_lengths()[a:b]
                for f, a, b in zip(self._files, self._first, last, strict=True)
            ]
        )

    @property
    def num_documents(self) -> int:
        """Return the number of documents."""
        return int(self._bounds[-1])

    def _locate(self, number: int) -> tuple[Indexed, int]:
        file = int(np.searchsorted(self._bounds, number, side="right")) - 1
        return self._files[file], int(number - self._bounds[file]) + self._first[file]

    def document(self, number: int) -> np.ndarray:
        """Return the tokens of one document."""
        file, inside = self._locate(number)
        return file.document(inside)

    def trained(self, number: int) -> np.ndarray:
        """Return which tokens of one document are trained on."""
        file, inside = self._locate(number)
        return file.trained(inside)

    def require_trained_tokens(self) -> None:
        """Check that some token is trained on that is not the first of its document.

        Raises:
            DataError: None is; the model would learn nothing from these data.
        """
        if self.has_modes and not any(
            self.trained(number)[1:].any() for number in range(self.num_documents)
        ):
            raise DataError(
                f"{', '.join(self.prefixes)}: none of the {self.num_documents} documents in this "
                "share has a token that is trained on (their responses are empty). Check the file "
                "they were prepared from."
            )

    def name_of(self, number: int) -> str:
        """Return the file and number of a document, for messages."""
        file, inside = self._locate(number)
        return f"{file.prefix}: document {inside}"
