"""Samples of several sources in given shares."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sorted.data.samples.blend_order import BlendOrder
from megatron_sorted.data.samples.sample import Sample, SampleSource


@dataclass(frozen=True)
class BlendPart:
    """One source of a blend: its weight relative to the others', its prefix, and its samples."""

    weight: float
    name: str
    source: SampleSource


class BlendedSamples(SampleSource):
    """Samples of several sources.

    After any number of samples each source has given its share, rounded up or down. Sample number
    -> (source, number within it) follows from the weights alone. Each source passes through its own
    epochs in the order it has when it is trained on alone. Sources of different kinds can be
    combined: each packs its own samples.
    """

    def __init__(self, parts: Sequence[BlendPart]):
        self.parts = tuple(parts)
        self._order = BlendOrder([part.weight for part in parts])
        self.shares = tuple(part / self._order.total for part in self._order.parts)
        sources = [part.source for part in parts]
        self.seq_length, self.pad_id = sources[0].seq_length, sources[0].pad_id
        self.packs = any(source.packs for source in sources)
        self.fill = sum(
            share * source.fill for share, source in zip(self.shares, sources, strict=True)
        )
        passes_per_sample = sum(
            share**2 / source.samples_per_epoch
            for share, source in zip(self.shares, sources, strict=True)
        )
        self.samples_per_epoch = round(1 / passes_per_sample)

    def sample(self, index: int) -> Sample:
        """Return one sample of one of the sources."""
        source, number = self._order.locate(index)
        return self.parts[source].source.sample(number)

    def epoch_at(self, sample: int) -> float:
        """Return the mean number of passes over the sources in the first ``sample`` samples."""
        return sum(
            share * epoch
            for share, epoch in zip(self.shares, self.epochs_at(sample).values(), strict=True)
        )

    def epochs_at(self, sample: int) -> dict[str, float]:
        """Return {prefix: passes over it in the first ``sample`` samples}."""
        return {
            part.name: part.source.epoch_at(count)
            for part, count in zip(self.parts, self._order.counts(sample), strict=True)
        }

    def describe(self) -> str:
        """Return a line for the whole and one for each source, with its share of the samples."""
        lines = [
            f"blend of {len(self.parts)} sources, {100 * self.fill:.1f} % filled; one pass is "
            f"about {self.samples_per_epoch} samples"
        ]
        lines += [
            f"  {100 * share:.4g} % {part.name} (weight {part.weight:g}): {part.source.describe()}"
            for share, part in zip(self.shares, self.parts, strict=True)
        ]
        return "\n".join(lines)
