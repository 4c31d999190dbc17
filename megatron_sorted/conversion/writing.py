"""How a conversion writes a directory, and what became of it; both directions write alike."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.conversion.origins import Part
from megatron_sorted.conversion.verifying.comparison import TOLERANCE, Comparison, compare_part
from megatron_sorted.errors import CheckpointError

Watch = Callable[[str, int], Callable[[int], None]]
"""Is called with a title and the bytes to come, and returns what counts them."""


def silent(_title: str, _num_bytes: int) -> Callable[[int], None]:
    """Return a progress that shows nothing."""
    return lambda _done: None


@dataclass(frozen=True)
class Writing:
    """How a directory is written.

    Attributes:
        overwrite: Replace what is there.
        verify: Compare every tensor, and the logits of every exit with transformers'.
        tolerance: Of logits, relative to the largest.
        watch: Shows progress.
    """

    overwrite: bool = False
    verify: bool = True
    tolerance: float = TOLERANCE
    watch: Watch = silent

    def compared(
        self, part: Part, written: Path, num_bytes: int, destination: Path
    ) -> Comparison | None:
        """Return how what was written compares with what it was made of; None: not verified.

        Args:
            part: What it was made of.
            written: Where it lies.
            num_bytes: Of its tensors.
            destination: The name it is to get.

        Raises:
            CheckpointError: The two differ.
        """
        if not self.verify:
            return None
        progress = self.watch("verifying", num_bytes)
        found = compare_part(part, open_model(written), self.tolerance, progress)
        if problems := found.problems:
            more = " ..." if len(problems) > 5 else ""
            raise CheckpointError(
                f"{destination}: the conversion does not match its origin, so nothing was "
                f"written. {'; '.join(problems[:5])}{more}"
            )
        return found


@dataclass(frozen=True)
class Written:
    """What became of a conversion.

    Attributes:
        comparison: With what it was made of; None if it was not verified.
        notes: Lines to show, about the tokenizer and the form in which the model is asked.
    """

    comparison: Comparison | None
    notes: tuple[str, ...] = ()
