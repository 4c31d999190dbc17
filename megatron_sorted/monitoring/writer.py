"""What every place that reports go to can do."""

from abc import ABC, abstractmethod

from megatron_sorted.monitoring.report import EvaluationReport, StepReport

Report = StepReport | EvaluationReport


class ReportWriter(ABC):
    """One place that reports go to. One process has one: the one that holds the reduced numbers.

    An error of ``start`` is a user's to mend and ends the run before training; one of ``write`` or ``close`` never does.

    Attributes:
        name: What messages call it.
    """

    name: str

    @abstractmethod
    def start(self) -> None:
        """Open what is written to.

        Raises:
            SettingsError: it cannot be written.
        """

    @abstractmethod
    def write(self, report: Report) -> None:
        """Write one report; never waits for a network."""

    def notes(self) -> list[str]:
        """Return the lines to tell the user since the last call: what went wrong and the remedy, each thing once."""
        return []

    @abstractmethod
    def close(self) -> None:
        """Write what is left; returns within seconds."""
