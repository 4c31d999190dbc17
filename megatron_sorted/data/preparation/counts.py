"""Counts of a preparation: samples read and skipped, documents and tokens written."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_sorted.data.indexed import RESPONSE, Documents

SHOWN_LINES = 5


@dataclass
class Skipped:
    """Skipped samples by reason: their number, and the positions of the first of them."""

    count: dict[str, int] = field(default_factory=dict)
    where: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, places: list[str], count: int = 1) -> None:
        """Count ``count`` samples, the first of which are at ``places``."""
        self.count[reason] = self.count.get(reason, 0) + count
        first = self.where.setdefault(reason, [])
        first += places[: SHOWN_LINES - len(first)]

    def merge(self, other: "Skipped") -> None:
        """Add the counts of a later block."""
        for reason, count in other.count.items():
            self.add(reason, other.where[reason], count)


@dataclass
class SetCounts:
    """The counts of one indexed file."""

    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def add(self, documents: Documents) -> None:
        """Count more documents.

        Trained tokens are those of responses, without a document's first token, which nothing
        predicts.
        """
        self.documents += len(documents.num_sequences)
        self.tokens += int(documents.lengths.sum())
        first = documents.num_sequences.cumsum() - documents.num_sequences
        self.trained_tokens += int(documents.lengths[documents.modes == RESPONSE].sum()) - int(
            (documents.modes[first] == RESPONSE).sum()
        )


@dataclass
class Summary:
    """Everything that was counted, as it is written to ``PREFIX.json``."""

    samples_read: int = 0
    train: SetCounts = field(default_factory=SetCounts)
    valid: SetCounts = field(default_factory=SetCounts)
    truncated: int = 0
    skipped: Skipped = field(default_factory=Skipped)
    tokenizer: dict = field(default_factory=dict)
    seconds: float = 0.0
    split: int = 0
    prompt_form: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def samples_per_second(self) -> float:
        """Return how many samples were read per second."""
        return self.samples_read / max(self.seconds, 1e-9)

    def as_json(self, options: Mapping[str, Any]) -> str:
        """Return the content of ``PREFIX.json``, including the options of the preparation."""
        content = {**asdict(self), "samples_per_second": self.samples_per_second, **options}
        return json.dumps(content, indent=1) + "\n"

    def lines(self) -> list[str]:
        """Return the counts as a small table."""
        rows = [
            ("samples read", f"{self.samples_read:,}"),
            ("documents", f"{self.train.documents:,}"),
            ("tokens", f"{self.train.tokens:,}"),
            ("trained tokens", f"{self.train.trained_tokens:,}"),
        ]
        if self.valid.documents:
            rows += [
                ("valid documents", f"{self.valid.documents:,}"),
                ("valid tokens", f"{self.valid.tokens:,}"),
            ]
        rows.append(("truncated", f"{self.truncated:,}"))
        if self.split:
            rows.append(
                (
                    "in several documents",
                    f"{self.split:,}  earlier turns are written differently once there are later "
                    "ones",
                )
            )
        rows += [
            (f"skipped: {reason}", f"{count:,}  first at {', '.join(self.skipped.where[reason])}")
            for reason, count in sorted(self.skipped.count.items())
        ]
        ends = " ".join(end["text"] for end in self.prompt_form["ends"]) or "nothing"
        rows.append(
            (
                "prompt form",
                f"{self.prompt_form['name']}; answers end with {ends}"
                if self.prompt_form["name"] != "text"
                else f"text; documents end with {ends}",
            )
        )
        name, sha256, vocab_size = (self.tokenizer[key] for key in ("name", "sha256", "vocab_size"))
        rows += [
            ("tokenizer", f"{name}  sha256 {sha256[:16]}  vocabulary {vocab_size:,}"),
            ("seconds", f"{self.seconds:.1f}"),
            ("samples/s", f"{self.samples_per_second:,.0f}"),
        ]
        return [f"{title:<28} {value}" for title, value in rows]
