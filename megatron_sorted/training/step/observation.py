"""The sums that learned coefficient rules need, which join the optimizer step's own all-reduce."""

import math
from collections.abc import Sequence

import torch

from megatron_sorted.exits.coefficients import EXIT_LAYERS, GRADIENTS, Observation
from megatron_sorted.loss.ledger import COLUMNS, GRADIENT
from megatron_sorted.platform.state import current_device
from megatron_sorted.settings.derived import exit_depths
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step.confidence import NUM_BINS, bin_edges
from megatron_sorted.training.step.forward_step import ForwardStep


def loss_columns(settings: Settings) -> tuple[int, int]:
    """Return the two columns of the ledger whose quotient is the mean loss of a run."""
    per_token = settings.calculate_per_token_loss
    total, count = ("loss", "tokens") if per_token else ("mean_loss", "micro_batches")
    return COLUMNS.index(total), COLUMNS.index(count)


def numbers_to_observe(forward_step: ForwardStep) -> torch.Tensor:
    """Return this rank's sums of the last step, float64 [numbers], on the device.

    For each exit there are two numbers for the loss, and one for its gradient if the rule needs it;
    then, if it needs them, those of ``Confidences.count``. Without a learned rule there are none.

    Collective: that of ``Confidences.count``, if a rule needs to know where tokens leave.
    """
    needs, settings, ledger = forward_step.observes, forward_step.settings, forward_step.ledger
    if not needs:
        return torch.zeros(0, dtype=torch.float64, device=current_device())
    columns = [*loss_columns(settings), *([GRADIENT] if GRADIENTS in needs else [])]
    nothing = torch.zeros(len(columns), dtype=torch.float64, device=current_device())
    parts = [
        torch.stack([ledger.sums[depth][column] for column in columns])
        if depth in ledger.sums
        else nothing
        for depth in exit_depths(settings)
    ]
    if EXIT_LAYERS in needs:
        confidences = forward_step.losses.confidences
        parts.append(confidences.count(forward_step.model.layout, forward_step.device))
    return torch.cat(parts)


def read_observation(sums: Sequence[float], forward_step: ForwardStep) -> Observation | None:
    """Return the observation that a learned rule takes; None where the rule does not learn.

    Args:
        sums: The numbers of ``numbers_to_observe``, summed over all ranks.
        forward_step: The forward step, with the coefficients of the step.
    """
    needs, settings = forward_step.observes, forward_step.settings
    if not needs:
        return None
    depths, width = exit_depths(settings), 3 if GRADIENTS in needs else 2
    rows = {depth: sums[i * width : (i + 1) * width] for i, depth in enumerate(depths)}
    coefficients = {
        depth: forward_step.coefficients[depth]
        for depth in depths
        if rows[depth][1] > 0 and forward_step.coefficients.get(depth, 0.0) > 0
    }
    # each tensor parallel rank holds the whole gradient unless it holds a part of the sequence
    tensor_ranks = forward_step.model.groups.tp.size()
    copies = 1 if settings.sequence_parallel else tensor_ranks
    norms = {}
    if GRADIENTS in needs:
        norms = {depth: math.sqrt(rows[depth][2] / copies) for depth in coefficients}
    shares, confidences = {}, (0.0, 1.0)
    if EXIT_LAYERS in needs:
        shares, confidences = _read_confidences(sums[len(depths) * width :], forward_step)
    losses = {depth: rows[depth][0] / rows[depth][1] for depth in coefficients}
    return Observation(losses, coefficients, norms, shares, confidences)


def _read_confidences(
    sums: Sequence[float], forward_step: ForwardStep
) -> tuple[dict[int, float], tuple[float, float]]:
    """Return the share of tokens that leave at each exit, and the range of confidences.

    The range is given by the borders of the outermost bins that hold a confidence.
    """
    depths = exit_depths(forward_step.settings)
    gained, tokens, bins = sums[: len(depths)], sums[len(depths)], sums[len(depths) + 1 :]
    total = tokens * len(forward_step.losses.confidences.thresholds)
    shares = {
        depth: gain / total if total else 0.0 for depth, gain in zip(depths, gained, strict=True)
    }
    shares[depths[-1]] = 1 - sum(shares[depth] for depth in depths[:-1])
    filled = [number for number in range(NUM_BINS) if bins[number] > 0]
    edges = bin_edges(forward_step.model.vocab_size)
    return shares, (edges[filled[0]], edges[filled[-1] + 1]) if filled else (0.0, 1.0)
