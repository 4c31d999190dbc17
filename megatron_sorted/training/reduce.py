"""Sums of all ranks: what the exits of a step or of an evaluation said over the whole global batch."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_sorted.loss.ledger import COLUMNS, Ledger
from megatron_sorted.platform.state import current_device
from megatron_sorted.settings.derived import exit_depths
from megatron_sorted.settings.run import Settings


@dataclass(frozen=True)
class ExitReport:
    """One exit over the tokens counted.

    Attributes:
        loss: Mean loss, in nats a token.
        token_accuracy: Share of tokens predicted right.
        exact_match: Share of documents with every trained token predicted right, which is what greedy decoding from the prompt
            would reproduce; None where documents were not counted.
        num_tokens: Trained tokens.
    """

    loss: float
    token_accuracy: float
    exact_match: float | None
    num_tokens: float


def reduce_ledger(ledger: Ledger, settings: Settings) -> dict[int, ExitReport]:
    """Returns the report of every exit that was computed, the same on all ranks.

    Collective: one all-reduce over all ranks, of a few numbers an exit. Makes the host wait for the device.
    """
    depths = exit_depths(settings)
    device = current_device()
    table = torch.zeros(len(depths), len(COLUMNS), dtype=torch.float64, device=device)
    for row, depth in enumerate(depths):
        if depth in ledger.sums:
            table[row] = ledger.sums[depth]
    dist.all_reduce(table)
    table = table.cpu() / settings.tensor_model_parallel_size  # tensor parallel ranks counted the same tokens
    reports = {}
    for row, depth in enumerate(depths):
        loss, correct, tokens, mean, micro_batches, pieces, exact = table[row].tolist()
        if micro_batches:
            value = loss / max(tokens, 1) if settings.calculate_per_token_loss else mean / micro_batches
            reports[depth] = ExitReport(value, correct / max(tokens, 1), exact / pieces if pieces else None, tokens)
    return reports
