"""Sums of all ranks: what the exits of the steps since a report, or of an evaluation, said over the whole global batch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sorted.loss.agreement import accept_length
from megatron_sorted.loss.ledger import COLUMNS, Ledger
from megatron_sorted.monitoring.report import ExitNumbers
from megatron_sorted.platform.state import current_device
from megatron_sorted.settings.derived import exit_depths
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.timers import PHASES

CHECKSUM_RANGE = 2**32  # sums of this many ranks' remainders are exact in float64


@dataclass(frozen=True)
class ExitReport:
    """One exit over the tokens counted.

    Attributes:
        loss: Mean loss, in nats a token: over all trained tokens, or with --no-calculate-per-token-loss over the means of
            micro-batches that have trained tokens. None where none was trained.
        token_accuracy: Share of tokens predicted right; None where none was trained.
        exact_match: Share of documents with every trained token predicted right, which is what greedy decoding from the prompt
            would reproduce; None where documents were not counted.
        num_tokens: Trained tokens.
        grad_norm: Norm, over all tokens of the global batch, of the gradient that the exit's own loss (with its coefficient)
            sends into the hidden state below it; over several steps the root of the mean square, of the steps in which the exit
            trained. None in evaluation.
        agreement: Share of tokens for which the exit and the last exit find the same token most likely; None unless compared.
        accept_length: See ``loss.agreement.accept_length``; 1 for the last exit, which drafts for nobody.
        kd: Mean KL divergence from its teacher at the temperature, in nats a token; None for an exit without one.
        gradient_cosine: Cosine between the gradient that the exit's own loss sends into the layers below and the one that comes from
            all deeper exits, both as one vector over all tokens of the global batch; None unless measured, or where one is 0.
        gradient_ratio: Norm of the first over that of the second.
    """

    loss: float | None
    token_accuracy: float | None
    exact_match: float | None
    num_tokens: float
    grad_norm: float | None = None
    agreement: float | None = None
    accept_length: float | None = None
    kd: float | None = None
    gradient_cosine: float | None = None
    gradient_ratio: float | None = None


@dataclass(frozen=True)
class IntervalReport:
    """What all ranks together know of the steps since the last report.

    Attributes:
        exits: By depth.
        checksum: Sum of the checksums of all samples, modulo 2^32: the same for the same samples in any layout.
        memory_bytes: Largest peak of any rank.
        phases: Longest mean seconds of each phase on any rank.
    """

    exits: dict[int, ExitReport]
    checksum: int
    memory_bytes: int
    phases: dict[str, float] = field(default_factory=dict)


def exit_numbers(report: ExitReport, coefficient: float | None = None) -> ExitNumbers:
    """Returns one exit's numbers as reports hold them; ``coefficient`` is that of its loss, None in evaluation."""
    return ExitNumbers(report.loss, report.token_accuracy, coefficient, report.exact_match, report.grad_norm, report.agreement,
                       report.accept_length, report.kd, report.gradient_cosine, report.gradient_ratio)


def reduce_ledger(ledger: Ledger, settings: Settings) -> dict[int, ExitReport]:
    """Returns the report of every exit that was computed, the same on all ranks.

    Collective: one all-reduce over all ranks, of a few numbers an exit. Makes the host wait for the device.
    """
    return _reduce_sums(ledger, settings, 0)[0]


def reduce_interval(ledger: Ledger, settings: Settings, checksum: int = 0, memory_bytes: int = 0,
                    phases: Mapping[str, float] | None = None) -> IntervalReport:
    """Returns the report of the steps since the last one, the same on all ranks.

    Collective: two all-reduces over all ranks: sums of a few numbers an exit, and maxima of a few numbers. Makes the host wait for the
    device.

    Args:
        ledger: Sums of this rank.
        settings: The run.
        checksum: ``ForwardStep.take_checksum()``; ranks that read the same samples are counted once.
        memory_bytes: This rank's peak.
        phases: This rank's ``PhaseTimers.take()``; either every rank measures or none.
    """
    exits, total = _reduce_sums(ledger, settings, checksum)
    phases = phases or {}
    mine = [float(memory_bytes), *(phases.get(name, -1.0) for name in PHASES)]
    largest = torch.tensor(mine, dtype=torch.float64, device=current_device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    memory, *seconds = largest.tolist()
    return IntervalReport(exits, total, int(memory), {name: value for name, value in zip(PHASES, seconds, strict=True) if value >= 0})


def _reads_first() -> bool:
    """Returns whether this rank stands for all that read the same samples."""
    return (parallel_state.get_pipeline_model_parallel_rank() == 0 and parallel_state.get_tensor_model_parallel_rank() == 0
            and parallel_state.get_context_parallel_rank() == 0)


def _reduce_sums(ledger: Ledger, settings: Settings, checksum: int) -> tuple[dict[int, ExitReport], int]:
    """Returns the exits' reports and the sum of the checksums.

    Collective: one all-reduce over all ranks.
    """
    depths, device, drafted = exit_depths(settings), current_device(), settings.num_draft_tokens
    table = torch.zeros(len(depths) + 1, len(COLUMNS) + 2 * drafted, dtype=torch.float64, device=device)
    for row, depth in enumerate(depths):
        if depth in ledger.sums:
            table[row, : len(COLUMNS)] = ledger.sums[depth]
        if depth in ledger.drafts:
            table[row, len(COLUMNS) :] = ledger.drafts[depth].reshape(-1)
    if _reads_first():
        table[-1, 0] = checksum % CHECKSUM_RANGE
    dist.all_reduce(table)
    table = table.cpu()
    tp = settings.tensor_model_parallel_size
    # tensor parallel ranks counted the same tokens, and hold the same gradient unless each holds a part of the sequence
    whole_gradient = 1 if settings.sequence_parallel else tp
    ranks_a_stage = dist.get_world_size() // settings.pipeline_model_parallel_size
    reports = {}
    for row, depth in enumerate(depths):
        numbers = dict(zip(COLUMNS, table[row].tolist(), strict=False))
        seen, agreed = (table[row, len(COLUMNS) :] / tp).view(2, drafted).tolist()
        if numbers["calls"]:
            reports[depth] = _exit_report(numbers, settings, tp, whole_gradient, ranks_a_stage, seen, agreed, depth == settings.num_layers)
    return reports, int(table[-1, 0]) % CHECKSUM_RANGE


def _exit_report(numbers: dict[str, float], settings: Settings, tp: int, whole_gradient: int, ranks_a_stage: int, seen: list[float],
                 agreed: list[float], is_last: bool) -> ExitReport:
    tokens = numbers["tokens"] / tp
    loss = accuracy = None  # there is no mean of nothing
    if tokens:
        loss = numbers["loss"] / tp / tokens if settings.calculate_per_token_loss else numbers["mean_loss"] / numbers["micro_batches"]
        accuracy = numbers["correct"] / tp / tokens
    grad_norm = None
    if numbers["steps"]:
        grad_norm = math.sqrt(numbers["gradient_square"] / whole_gradient / (numbers["steps"] / ranks_a_stage))
    agreement = length = None
    if seen[0]:
        agreement, length = agreed[0] / seen[0], 1.0 if is_last else accept_length(seen, agreed)
    return ExitReport(loss, accuracy, numbers["exact_pieces"] / numbers["pieces"] if numbers["pieces"] else None,
                      tokens, grad_norm, agreement, length, _mean_kd(numbers, settings, tp, tokens), *_meeting(numbers))


def _mean_kd(numbers: dict[str, float], settings: Settings, tp: int, tokens: float) -> float | None:
    """Returns the mean divergence from the teacher, by the rule that the loss is averaged by."""
    if not numbers["taught_batches"]:
        return None
    return numbers["kl"] / tp / tokens if settings.calculate_per_token_loss else numbers["mean_kl"] / numbers["taught_batches"]


def _meeting(numbers: dict[str, float]) -> tuple[float | None, float | None]:
    """Returns cosine and ratio of norms of an exit's own gradient and the deeper exits'."""
    own, deeper = math.sqrt(numbers["met_own"]), math.sqrt(numbers["met_deeper"])
    if not own or not deeper:
        return None, None
    return numbers["met_product"] / own / deeper, own / deeper
