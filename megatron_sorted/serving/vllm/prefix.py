"""The first layers of a model that vLLM has loaded, as a draft model without weights of its own."""

from torch import Tensor, nn

from megatron_sorted.serving.vllm.readout import Readout


class NestedPrefix(nn.Module):
    """A target model's embedding and first layers, with an exit's readout.

    The modules are the target's, kept where torch does not count them, so this module has no
    parameters. Its attention layers write keys and values into the target's own cache.

    Args:
        target: The target model.
        readout: What reads the hidden state after the layers.
    """

    def __init__(self, target: nn.Module, readout: Readout):
        super().__init__()
        self._target, self._readout = (target,), readout
        self.layers = list(target.model.layers[: readout.depth])

    def forward(
        self, input_ids: Tensor, positions: Tensor, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Return the normed hidden states [n, h] after the layers.

        Collective: tensor parallel, as the target's own layers.
        """
        hidden, residual = self._target[0].embed_input_ids(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return self._readout.norm(hidden, residual)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [n, v]. Collective: tensor parallel."""
        return self._readout.logits(hidden)
