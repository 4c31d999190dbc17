"""Options and result of a conversion, the same for both directions."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.conversion.origins import NetworkOrigin
from megatron_sorted.conversion.verifying.comparison import TOLERANCE, Comparison, compare_network
from megatron_sorted.errors import CheckpointError

Watch = Callable[[str, int], Callable[[int], None]]
"""Starts a progress display, given title and number of bytes; returns what adds bytes to it."""


def silent(_title: str, _num_bytes: int) -> Callable[[int], None]:
    """Start a progress display that shows nothing."""
    return lambda _done: None


@dataclass(frozen=True)
class WriteOptions:
    """Options for writing a directory.

    Attributes:
        overwrite: Whether to replace an existing directory.
        verify: Whether to compare every tensor, and the logits of every exit with transformers'.
        tolerance: Largest difference of logits, relative to the largest logit.
        watch: The progress display.
    """

    overwrite: bool = False
    verify: bool = True
    tolerance: float = TOLERANCE
    watch: Watch = silent

    def verify_written(
        self, network: NetworkOrigin, written: Path, num_bytes: int, destination: Path
    ) -> Comparison | None:
        """Compare a written directory with its origin, if ``verify`` is set; otherwise return None.

        Args:
            network: The network and its origin.
            written: The directory that was written.
            num_bytes: Size of its tensors.
            destination: The name it will have, for messages.

        Raises:
            CheckpointError: The two models differ.
        """
        if not self.verify:
            return None
        progress = self.watch("verifying", num_bytes)
        comparison = compare_network(network, open_model(written), self.tolerance, progress)
        if problems := comparison.problems:
            more = " ..." if len(problems) > 5 else ""
            raise CheckpointError(
                f"{destination}: the conversion does not match its origin, so nothing was "
                f"written. {'; '.join(problems[:5])}{more}"
            )
        return comparison


@dataclass(frozen=True)
class ConversionResult:
    """The result of a conversion.

    Attributes:
        comparison: The comparison of origin and result; None if it was not verified.
        notes: Lines to print about the tokenizer and the prompt template.
    """

    comparison: Comparison | None
    notes: tuple[str, ...] = ()
