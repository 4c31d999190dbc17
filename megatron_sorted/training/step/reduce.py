"""Sums over all ranks: the numbers of every exit since a report, or of an evaluation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from megatron_sorted.loss.agreement import accept_length
from megatron_sorted.loss.ledger import COLUMNS, Ledger
from megatron_sorted.monitoring.report import ExitNumbers
from megatron_sorted.parallel.groups import process_groups
from megatron_sorted.platform.state import current_device
from megatron_sorted.settings.derived import exit_depths
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.watch.timers import PHASES

CHECKSUM_RANGE = 2**32  # remainders of this many ranks have a sum that is exact in float64


@dataclass(frozen=True)
class LedgerReport:
    """The ledgers of all ranks together.

    Attributes:
        exits: {depth: numbers of the exit}, without coefficients.
        num_tokens: Trained tokens of the exit that saw most.
        checksum: Sum of the checksums of all samples, modulo 2^32: the same for the same samples in
            any layout.
        memory_bytes: Largest peak of any rank; 0 if not requested.
        phases: Longest mean seconds of each measured phase on any rank.
    """

    exits: dict[int, ExitNumbers]
    num_tokens: int
    checksum: int
    memory_bytes: int = 0
    phases: dict[str, float] = field(default_factory=dict)


def reduce_interval(
    ledger: Ledger,
    settings: Settings,
    checksum: int = 0,
    memory_bytes: int = 0,
    phases: Mapping[str, float] | None = None,
) -> LedgerReport:
    """Return the report of the steps since the last one, the same on all ranks.

    Collective: two all-reduces over all ranks: sums of a few numbers an exit, and maxima of a few
        numbers. Makes the host wait for the device.

    Args:
        ledger: Sums of this rank.
        settings: The run.
        checksum: ``ForwardStep.take_checksum()``; ranks that read the same samples are counted
            once.
        memory_bytes: This rank's peak.
        phases: This rank's ``PhaseTimers.take()``; either every rank measures or none.
    """
    summed = reduce_ledger(ledger, settings, checksum)
    phases = phases or {}
    own = [float(memory_bytes), *(phases.get(name, -1.0) for name in PHASES)]
    largest = torch.tensor(own, dtype=torch.float64, device=current_device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=dist.group.WORLD)
    memory, *seconds = largest.tolist()
    measured = {name: value for name, value in zip(PHASES, seconds, strict=True) if value >= 0}
    return replace(summed, memory_bytes=int(memory), phases=measured)


def _counts_samples() -> bool:
    """Return whether this rank counts the samples for all ranks that read the same ones."""
    groups = process_groups()
    return groups.pp.rank() == groups.tp.rank() == groups.cp.rank() == 0


def reduce_ledger(ledger: Ledger, settings: Settings, checksum: int = 0) -> LedgerReport:
    """Return the report of every exit that was computed, the same on all ranks.

    Collective: one all-reduce over all ranks, of a few numbers an exit. Makes the host wait for the
        device.

    Args:
        ledger: Sums of this rank.
        settings: The run.
        checksum: See ``reduce_interval``.
    """
    depths, device, num_drafted = exit_depths(settings), current_device(), settings.num_draft_tokens
    table = torch.zeros(
        len(depths) + 1, len(COLUMNS) + 2 * num_drafted, dtype=torch.float64, device=device
    )
    for row, depth in enumerate(depths):
        if depth in ledger.sums:
            table[row, : len(COLUMNS)] = ledger.sums[depth]
        if depth in ledger.drafts:
            table[row, len(COLUMNS) :] = ledger.drafts[depth].reshape(-1)
    if _counts_samples():
        table[-1, 0] = checksum % CHECKSUM_RANGE
    dist.all_reduce(table, group=dist.group.WORLD)
    table = table.cpu()
    tp, exits, num_tokens = settings.tensor_model_parallel_size, {}, 0.0
    for row, depth in enumerate(depths):
        sums = dict(zip(COLUMNS, table[row].tolist(), strict=False))
        if not sums["calls"]:
            continue
        seen, agreed = (table[row, len(COLUMNS) :] / tp).view(2, num_drafted).tolist()
        numbers, length = _exit_numbers(sums, settings), None
        agreement = numbers.agreement
        if seen[0]:
            agreement = agreed[0] / seen[0] if agreement is None else agreement
            length = 1.0 if depth == settings.num_layers else accept_length(seen, agreed)
        exits[depth] = replace(numbers, agreement=agreement, accept_length=length)
        num_tokens = max(num_tokens, sums["tokens"] / tp)
    return LedgerReport(exits, int(num_tokens), int(table[-1, 0]) % CHECKSUM_RANGE)


def _exit_numbers(sums: dict[str, float], settings: Settings) -> ExitNumbers:
    """Return one exit's numbers, computed from the sums over all ranks, named as in ``COLUMNS``.

    Tensor parallel ranks counted the same tokens, and hold the same gradient unless each holds a
    part of the sequence.
    """
    tp = settings.tensor_model_parallel_size
    tokens = sums["tokens"] / tp
    loss = accuracy = grad_norm = None  # there is no mean of nothing
    if tokens:
        loss = (
            sums["loss"] / tp / tokens
            if settings.calculate_per_token_loss
            else sums["mean_loss"] / sums["micro_batches"]
        )
        accuracy = sums["correct"] / tp / tokens
    if sums["steps"]:
        copies = 1 if settings.sequence_parallel else tp
        ranks_a_stage = dist.get_world_size() // settings.pipeline_model_parallel_size
        grad_norm = math.sqrt(sums["gradient_square"] / copies / (sums["steps"] / ranks_a_stage))
    learns_choice = sums["taught_batches"] and settings.exit_kd_target == "choice"
    cosine, ratio = _compared_gradients(sums)
    return ExitNumbers(
        loss=loss,
        token_accuracy=accuracy,
        grad_norm=grad_norm,
        agreement=sums["agreed"] / tp / tokens if learns_choice and tokens else None,
        kd=_mean_kd(sums, settings, tp, tokens),
        exact_match=sums["exact_pieces"] / sums["pieces"] if sums["pieces"] else None,
        gradient_cosine=cosine,
        gradient_ratio=ratio,
    )


def _mean_kd(sums: dict[str, float], settings: Settings, tp: int, tokens: float) -> float | None:
    """Return the mean divergence from the teacher, averaged as the loss is."""
    if not sums["taught_batches"]:
        return None
    if settings.calculate_per_token_loss:
        return sums["kl"] / tp / tokens
    return sums["mean_kl"] / sums["taught_batches"]


def _compared_gradients(sums: dict[str, float]) -> tuple[float | None, float | None]:
    """Return the cosine between an exit's own gradient and the deeper exits', and their ratio."""
    own, deeper = math.sqrt(sums["met_own"]), math.sqrt(sums["met_deeper"])
    if not own or not deeper:
        return None, None
    return sums["met_product"] / own / deeper, own / deeper
