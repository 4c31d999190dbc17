"""From this rank's ledger to what a rule is told of the step: a few numbers that join the reduction the optimizer asks for anyway."""

import math
from collections.abc import Sequence

import torch
from megatron.core import parallel_state

from megatron_sorted.exits.coefficients import EXIT_LAYERS, GRADIENTS, Observation
from megatron_sorted.loss.ledger import COLUMNS, GRADIENT
from megatron_sorted.platform.state import current_device
from megatron_sorted.settings.derived import exit_depths
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step.confidence import NUM_BINS, bin_edges
from megatron_sorted.training.step.forward_step import ForwardStep


def loss_columns(settings: Settings) -> tuple[int, int]:
    """Return which two of the ledger's columns make the mean loss under the loss rule in force."""
    names = (
        ("loss", "tokens") if settings.calculate_per_token_loss else ("mean_loss", "micro_batches")
    )
    return COLUMNS.index(names[0]), COLUMNS.index(names[1])


def numbers_to_observe(forward_step: ForwardStep) -> torch.Tensor:
    """Return this rank's sums of the step just passed, float64 [numbers], on the device; none where no rule learns.

    For each exit two numbers for the loss, and one for its gradient if asked; then, if asked, ``Confidences.count``.

    Collective: that of ``Confidences.count``, if a rule asks where tokens leave.
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
        parts.append(
            forward_step.losses.confidences.count(forward_step.model.layout, forward_step.device)
        )
    return torch.cat(parts)


def read_observation(sums: Sequence[float], forward_step: ForwardStep) -> Observation | None:
    """Return what ``numbers_to_observe`` says once it is summed over all ranks and read; None where no rule learns."""
    needs, settings = forward_step.observes, forward_step.settings
    if not needs:
        return None
    depths, wide = exit_depths(settings), 3 if GRADIENTS in needs else 2
    rows = {depth: sums[place * wide : (place + 1) * wide] for place, depth in enumerate(depths)}
    trained = [
        depth
        for depth in depths
        if rows[depth][1] > 0 and forward_step.coefficients.get(depth, 0.0) > 0
    ]
    # each tensor parallel rank counted all tokens, and holds the whole gradient unless it holds a part of the sequence
    copies = (
        1 if settings.sequence_parallel else parallel_state.get_tensor_model_parallel_world_size()
    )
    norms = (
        {depth: math.sqrt(rows[depth][2] / copies) for depth in trained}
        if GRADIENTS in needs
        else {}
    )
    shares, confidences = {}, (0.0, 1.0)
    if EXIT_LAYERS in needs:
        shares, confidences = _read_confidences(sums[len(depths) * wide :], forward_step)
    return Observation(
        {depth: rows[depth][0] / rows[depth][1] for depth in trained},
        {depth: forward_step.coefficients[depth] for depth in trained},
        norms,
        shares,
        confidences,
    )


def _read_confidences(
    sums: Sequence[float], forward_step: ForwardStep
) -> tuple[dict[int, float], tuple[float, float]]:
    """Return the share of tokens that leave at each exit, and the range of confidences: the borders of the outermost bins hit."""
    depths = exit_depths(forward_step.settings)
    gained, tokens, bins = sums[: len(depths)], sums[len(depths)], sums[len(depths) + 1 :]
    whole = tokens * len(forward_step.losses.confidences.thresholds)
    shares = {
        depth: gain / whole if whole else 0.0 for depth, gain in zip(depths, gained, strict=True)
    }
    shares[depths[-1]] = 1 - sum(shares[depth] for depth in depths[:-1])
    hit = [number for number in range(NUM_BINS) if bins[number] > 0]
    edges = bin_edges(forward_step.model.vocab_size)
    return shares, (edges[hit[0]], edges[hit[-1] + 1]) if hit else (0.0, 1.0)
