"""The first layers of a model that vLLM has loaded, as a draft model without weights of its own."""

from torch import Tensor, nn

from megatron_sorted.serving.vllm.readout import Readout


class NestedPrefix(nn.Module):
    """A target's embedding and layers between two exits, with the readout of the deeper one.

    The modules are the target's, kept where torch does not count them. So this module has no
    parameters of the target, and its layers write keys and values into the target's own cache.

    Args:
        target: The target model.
        first: Number of layers below; with 0 the prefix begins with the embedding.
        depth: The depth of the exit.
        readout: What reads the hidden state after the layers.
    """

    def __init__(self, target: nn.Module, first: int, depth: int, readout: Readout):
        super().__init__()
        self.embed, self.layers = target.embed_input_ids, list(target.model.layers[first:depth])
        self.readout = readout

    def forward(
        self, input_ids: Tensor, positions: Tensor, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Return the normed hidden states [n, h] of tokens [n].

        Collective: tensor parallel, as the target's own layers.
        """
        return self.readout.norm(self.run_layers(self.embed(input_ids), positions))

    def run_layers(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Return the hidden states [n, h] after the layers; the given ones may be overwritten.

        Collective: tensor parallel, as the target's own layers.
        """
        residual = None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return hidden + residual

    def compute_logits(self, normed: Tensor) -> Tensor:
        """Return the logits [n, v]. Collective: tensor parallel."""
        return self.readout.logits(normed)
