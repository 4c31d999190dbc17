"""The interface of every writer of reports."""

from abc import ABC, abstractmethod

from megatron_sorted.monitoring.report import EvaluationReport, StepReport

Report = StepReport | EvaluationReport


class ReportWriter(ABC):
    """A destination of reports, used by the one process that holds the reduced numbers.

    An error of ``start`` ends the run before training, since the user can correct it; one of
    ``write`` or ``close`` never does.

    Attributes:
        name: The writer's name in messages.
    """

    name: str

    @abstractmethod
    def start(self) -> None:
        """Open the destination.

        Raises:
            SettingsError: It cannot be written.
        """

    @abstractmethod
    def write(self, report: Report) -> None:
        """Write one report, without waiting for a network."""

    def notes(self) -> list[str]:
        """Return new lines for the user: problems and remedies, each once."""
        return []

    @abstractmethod
    def close(self) -> None:
        """Write the rest and return within seconds."""
