"""Sorted speculation in vLLM (S2D, arXiv 2407.01955): several exits draft, each token by one."""

import torch
from torch import Tensor
from vllm.forward_context import set_forward_context

from megatron_sorted.confidence import CONFIDENCE
from megatron_sorted.serving.vllm.metadata import select_texts
from megatron_sorted.serving.vllm.proposer import NestedProposer


class SortedProposer(NestedProposer):
    """Each drafted token comes from the first exit that is confident enough.

    A text's draft ends after a token of which no exit is confident, so drafts differ in length. The
    batch goes deeper while any text that still drafts needs it. What deeper layers have not read
    waits for them: they read all of it as soon as they run, as one query of the same length for
    every text.
    """

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        next_token_ids: Tensor,
        token_indices_to_sample: Tensor | None,
        common_attn_metadata,
        sampling_metadata,
        **_more,
    ) -> list[list[int]]:
        """Return the drafted tokens of each text.

        Collective: tensor parallel; all ranks draft the same tokens.
        """
        batch, _, cad = self.set_inputs_first_pass(
            target_token_ids,
            next_token_ids,
            target_positions,
            target_hidden_states,
            token_indices_to_sample,
            common_attn_metadata,
            None,
        )
        drafts: list[list[int]] = [[] for _ in range(batch)]
        live = torch.arange(batch, device=self.device)
        tokens, positions = self.input_ids[:batch], self.positions[:batch]
        # hidden states [b, q, h] that each segment has not read; the first reads tokens at once
        waiting: list[Tensor | None] = [None] * len(self.segments)
        for _ in range(num_speculative_tokens):
            waiting[0] = self.segments[0].embed(tokens)[:, None]
            tokens, sure = self._first_confident(cad, positions, waiting)
            for row, token in zip(live.tolist(), tokens.tolist(), strict=True):
                drafts[row].append(token)
            keep = sure.nonzero()[:, 0]
            if not len(keep):
                break
            live, tokens, positions = live[keep], tokens[keep], positions[keep] + 1
            waiting = [None if states is None else states[keep] for states in waiting]
            cad = select_texts(cad, keep)
        return drafts

    def _first_confident(
        self, cad, positions: Tensor, waiting: list[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """Return each text's next token [b], and whether an exit is confident of it [b].

        Args:
            cad: Metadata of the texts.
            positions: The position [b] of each text's last token.
            waiting: States that each segment has not read; updated.
        """
        measure = CONFIDENCE[self.options.measure]
        tokens = sure = None
        for place, (segment, threshold) in enumerate(
            zip(self.segments, self.options.thresholds, strict=True)
        ):
            states, waiting[place] = waiting[place], None
            states = self._read(segment, cad, positions, states)
            logits = segment.compute_logits(segment.readout.norm(states[:, -1]))
            confident, choice = measure(logits) > threshold, logits.argmax(-1)
            tokens = choice if sure is None else torch.where(sure, tokens, choice)
            sure = confident if sure is None else sure | confident
            if place + 1 < len(self.segments):
                before = waiting[place + 1]
                waiting[place + 1] = states if before is None else torch.cat((before, states), 1)
            if sure.all():
                break
        return tokens, sure

    def _read(self, segment, cad, positions: Tensor, states: Tensor) -> Tensor:
        """Return states [b, q, h] after a segment; the last of each text is at ``positions``."""
        rows, count, size = states.shape
        back = torch.arange(1 - count, 1, device=positions.device)
        positions_bq = positions[:, None] + back
        cad = self.queries(cad, positions_bq)
        _, by_layer = self.build_per_group_and_layer_attn_metadata(cad)
        slots = dict.fromkeys(self._draft_attn_layer_names, cad.slot_mapping)
        with set_forward_context(
            by_layer, self.vllm_config, num_tokens=rows * count, slot_mapping=slots
        ):
            # a copy: layers add to what they are given
            hidden = segment.run_layers(states.reshape(-1, size).clone(), positions_bq.reshape(-1))
        return hidden.view(rows, count, size)
