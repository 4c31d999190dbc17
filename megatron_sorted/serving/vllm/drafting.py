"""Sorted drafts (S2D, arXiv 2407.01955) of a batch: each token comes from one of several exits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class DraftExits:
    """The exits that draft, as functions of the layers between them.

    Attributes:
        thresholds: Confidence that each exit needs, the shallowest first.
        confidence: Function from logits [b, v] to the confidence [b].
        embed: Function from tokens [b] to states [b, h].
        read: Function (place of the exit, rows [b], positions [b, q], states [b, q, h]) -> states
            after the layers between the exit before and this one; they read q tokens of each text.
        logits: Function (place of the exit, states [b, h]) -> logits [b, v].
    """

    thresholds: Sequence[float]
    confidence: Callable[[Tensor], Tensor]
    embed: Callable[[Tensor], Tensor]
    read: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    logits: Callable[[int, Tensor], Tensor]

    def draft(self, tokens: Tensor, positions: Tensor, most: int) -> list[list[int]]:
        """Return the drafted tokens of each text, which ends with a token at a position [b].

        A text's draft ends after a token of which no exit is confident, so drafts differ in length.
        The batch goes deeper while any text that still drafts needs it. What deeper layers have not
        read waits for them: they read all of it as soon as they run.

        Args:
            tokens: The last token [b] of each text; no layer has read it.
            positions: The position [b] of that token.
            most: Largest number of tokens to draft.
        """
        drafts: list[list[int]] = [[] for _ in range(len(tokens))]
        rows = torch.arange(len(tokens), device=tokens.device)
        waiting: list[Tensor | None] = [None] * len(self.thresholds)
        for _ in range(most):
            waiting[0] = self.embed(tokens)[:, None]
            tokens, sure = self._first_confident(rows, positions, waiting)
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                drafts[row].append(token)
            keep = sure.nonzero()[:, 0]
            if not len(keep):
                break
            rows, tokens, positions = rows[keep], tokens[keep], positions[keep] + 1
            waiting = [None if states is None else states[keep] for states in waiting]
        return drafts

    def _first_confident(
        self, rows: Tensor, positions: Tensor, waiting: list[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """Return each text's next token [b], and whether an exit is confident of it [b].

        Args:
            rows: Which texts these are [b].
            positions: The position [b] of each text's last token.
            waiting: The states [b, q, h] that the layers up to each exit have not read; updated.
        """
        tokens = sure = None
        for place, threshold in enumerate(self.thresholds):
            states, waiting[place] = waiting[place], None
            back = torch.arange(1 - states.shape[1], 1, device=positions.device)
            states = self.read(place, rows, positions[:, None] + back, states)
            logits = self.logits(place, states[:, -1])
            confident, choice = self.confidence(logits) > threshold, logits.argmax(-1)
            tokens = choice if sure is None else torch.where(sure, tokens, choice)
            sure = confident if sure is None else sure | confident
            if place + 1 < len(self.thresholds):
                before = waiting[place + 1]
                waiting[place + 1] = states if before is None else torch.cat((before, states), 1)
            if sure.all():
                break
        return tokens, sure
