"""Sorted speculation in vLLM: several exits draft, and drafts differ in length."""

from torch import Tensor
from vllm.forward_context import set_forward_context

from megatron_sorted.confidence import CONFIDENCE
from megatron_sorted.serving.vllm.drafting import DraftExits
from megatron_sorted.serving.vllm.metadata import select_texts
from megatron_sorted.serving.vllm.proposer import NestedProposer


class SortedProposer(NestedProposer):
    """The proposer of `DraftExits`."""

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        next_token_ids: Tensor,
        token_indices_to_sample: Tensor | None,
        common_attn_metadata,
        *_arguments,
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
        self.num_speculative_tokens, segments = num_speculative_tokens, self.segments
        return DraftExits(
            self.options.thresholds,
            CONFIDENCE[self.options.measure],
            segments[0].embed,
            lambda place, *query: self._read(segments[place], cad, *query),
            lambda place, states: segments[place].compute_logits(
                segments[place].readout.norm(states)
            ),
        ).draft(self.input_ids[:batch], self.positions[:batch], num_speculative_tokens)

    def _read(self, segment, cad, rows: Tensor, positions: Tensor, states: Tensor) -> Tensor:
        """Return the states [b, q, h] of some texts after a segment's layers.

        Collective: tensor parallel.
        """
        cad = self.queries(select_texts(cad, rows), positions, self.num_speculative_tokens)
        _, by_layer = self.build_per_group_and_layer_attn_metadata(cad)
        slots = dict.fromkeys(self._draft_attn_layer_names, cad.slot_mapping)
        with set_forward_context(
            by_layer, self.vllm_config, num_tokens=positions.numel(), slot_mapping=slots
        ):
            # a copy: layers add to what they are given
            hidden = segment.run_layers(states.flatten(0, 1).clone(), positions.flatten())
        return hidden.view_as(states)
