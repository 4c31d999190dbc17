"""Self-speculation in vLLM: an exit of the target drafts with the target's own keys and values."""

import torch
from torch import Tensor, nn
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from megatron_sorted.serving.vllm.exits import Exits
from megatron_sorted.serving.vllm.metadata import queries
from megatron_sorted.serving.vllm.options import EngineOptions
from megatron_sorted.serving.vllm.parts import read_parts
from megatron_sorted.serving.vllm.prefix import NestedPrefix
from megatron_sorted.serving.vllm.readout import readout_of


class NestedProposer(DraftModelProposer):
    """vLLM's draft-model proposer, with the target's first layers as the draft model.

    The draft needs no pass over the prompt and nothing is repaired after a rejection: drafted
    tokens write keys and values into the slots that vLLM reserves behind each text, and
    verification writes those of the same layers and tokens there again.
    """

    def __init__(
        self, vllm_config, device: torch.device, runner, options: EngineOptions, exits: Exits
    ):
        super().__init__(vllm_config, device, runner)
        self.options, self.exits = options, exits

    def load_model(self, target_model: nn.Module) -> None:
        """Take the target's modules; only what an exit has of its own is loaded."""
        self.segments, first = [], 0
        for depth in self.options.depths:
            parts = read_parts(self.exits, depth)
            readout = readout_of(target_model, parts, self.vllm_config)
            self.segments.append(NestedPrefix(target_model, first, depth, readout))
            first = depth
        self.model = self.segments[0]
        self._draft_attn_layer_names = {
            layer.self_attn.attn.layer_name for segment in self.segments for layer in segment.layers
        }

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
            token_indices_to_sample: Where in n each text's last accepted token is [b]; None: at the
                end of its tokens.
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
        return batch, self.arange[:batch], self.queries(cad, self.positions[:batch, None], 1)

    def queries(self, cad, positions_bq: Tensor, longer: int):
        """Return metadata of a pass over tokens of each text; see ``metadata.queries``."""
        return queries(cad, positions_bq, longer, self.block_size, self.max_model_len)

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: Tensor,
        *arguments,
        num_rejected_tokens_gpu: Tensor | None = None,
        common_attn_metadata,
        **more,
    ) -> Tensor:
        """Return drafted tokens [b, n].

        vLLM's loop would subtract the rejected tokens from lengths that do not hold them.

        Collective: tensor parallel; all ranks draft the same tokens.
        """
        if num_speculative_tokens == 0:  # there is no cache of a draft model to keep up
            rows = common_attn_metadata.batch_size()
            return torch.empty(rows, 0, dtype=torch.int64, device=self.device)
        return super().propose(
            num_speculative_tokens,
            target_token_ids,
            *arguments,
            common_attn_metadata=common_attn_metadata,
            num_rejected_tokens_gpu=None,
            **more,
        )
