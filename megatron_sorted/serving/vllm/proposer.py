"""Self-speculation in vLLM: an exit of the target drafts with the target's own keys and values."""

import torch
from torch import Tensor, nn
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from megatron_sorted.serving.vllm.prefix import NestedPrefix
from megatron_sorted.serving.vllm.readout import Readout


class NestedProposer(DraftModelProposer):
    """vLLM's draft-model proposer, with the target's first layers as the draft model.

    The draft needs no pass over the prompt and nothing is repaired after a rejection: drafted
    tokens write keys and values into the slots that vLLM reserves behind each text, the slots where
    verification writes the same layers' keys and values again.

    Attributes:
        depths: Depths of the exits that draft.
    """

    depths: tuple[int, ...]

    def load_model(self, target_model: nn.Module) -> None:
        """Take the target's modules; nothing is loaded."""
        [depth] = self.depths
        self.model = NestedPrefix(target_model, Readout(depth, target_model))
        self._draft_attn_layer_names = attention_names(target_model, depth)

    def set_inputs_first_pass(
        self,
        target_token_ids: Tensor,
        next_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        token_indices_to_sample: Tensor | None,
        cad,
        num_rejected_tokens_gpu: Tensor | None,
    ):
        """Make the first pass read one token a request: the one that the target has just chosen.

        The target's keys and values of all tokens before it are in the cache.

        Args:
            target_token_ids: Tokens [n] that the target has read.
            next_token_ids: The token [b] that follows them in each text.
            target_positions: Positions [n] of the tokens that were read.
            target_hidden_states: Not used.
            token_indices_to_sample: Where in n each request's last accepted token is [b]; None: at
                the end of its tokens.
            cad: vLLM's attention metadata of the target's pass.
            num_rejected_tokens_gpu: Not used: the indices account for them.

        Returns:
            The number of tokens b, the indices [b] at which to read logits, and the metadata.
        """
        last = token_indices_to_sample
        if last is None:
            last = cad.query_start_loc[1:] - 1
        batch = cad.batch_size()
        self.input_ids[:batch] = next_token_ids
        self.positions[:batch] = target_positions[last] + 1
        return batch, self.arange[:batch], self.one_token_each(cad, self.positions[:batch], 1)

    def one_token_each(self, cad, positions: Tensor, grown: int):
        """Return attention metadata of a pass over one token of each request.

        Args:
            cad: Metadata of a pass of the same requests.
            positions: The tokens' positions [b].
            grown: How many tokens longer than in ``cad`` the longest text may be.
        """
        batch, last = positions.shape[0], self.max_model_len - 1
        within = positions.clamp(max=last)
        blocks = cad.block_table_tensor.gather(1, (within // self.block_size)[:, None])[:, 0]
        slots = blocks.long() * self.block_size + within % self.block_size
        ends = torch.arange(batch + 1, dtype=torch.int32)
        upper = cad.seq_lens_cpu_upper_bound
        return cad.replace(
            query_start_loc=self.arange[: batch + 1],
            query_start_loc_cpu=ends,
            seq_lens=(within + 1).to(cad.seq_lens.dtype),
            num_actual_tokens=batch,
            max_query_len=1,
            max_seq_len=min(cad.max_seq_len + grown, self.max_model_len),
            slot_mapping=slots,
            seq_lens_cpu_upper_bound=None if upper is None else upper + grown,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )

    def propose(self, *arguments, num_rejected_tokens_gpu: Tensor | None = None, **more) -> Tensor:
        """Return drafted tokens [b, n].

        vLLM's loop would subtract the rejected tokens from lengths that do not hold them.
        """
        return super().propose(*arguments, num_rejected_tokens_gpu=None, **more)


def attention_names(target: nn.Module, depth: int) -> set[str]:
    """Return vLLM's names of the attention of the first layers, by which it finds their cache."""
    return {layer.self_attn.attn.layer_name for layer in target.model.layers[:depth]}
