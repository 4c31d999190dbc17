"""LayerSkip's layer dropout: some samples skip some layers."""

import math
from collections.abc import Sequence

import torch

from megatron_sorted.exits.chance import uniform_number
from megatron_sorted.platform.contract import Platform
from megatron_sorted.settings.run import Settings


def drop_chance(settings: Settings, layer: int, step: int) -> float:
    """Return the probability that ``layer`` (from 0) is dropped for a sample at ``step`` (from 0).

        p = S(t) D(l) p_max,    D(l) = exp(l ln 2 / (L - 1)) - 1
        S(t) = 1 or exp(t ln 2 / (T - 1)) - 1,        for L layers and T steps

    Source: LayerSkip, arXiv 2404.16710, section 4.1.1.
    """
    scale = 1.0
    if settings.layer_dropout_schedule == "exponential":
        scale = math.expm1(min(step / max(settings.train_iters - 1, 1), 1.0) * math.log(2))
    return (
        settings.layer_dropout * scale * math.expm1(layer * math.log(2) / (settings.num_layers - 1))
    )


def is_dropped(settings: Settings, layer: int, step: int, sample: int) -> bool:
    """Return whether a sample of the global batch skips a layer; the same in every layout."""
    number = uniform_number(f"layer dropout {settings.seed}/{step}/{sample}/{layer}")
    return number < drop_chance(settings, layer, step)


class LayerDropout:
    """Hooks on a chunk's layers that make them x + m f(x), m 0 for dropped samples and else 1.

    As in the paper, nothing is rescaled. Every layer is computed for every sample and its output
    then dropped, so this saves no time; gradients of a dropped layer are exactly 0. Layers in
    evaluation mode drop nothing.

    Args:
        layers: Megatron's layers of the chunk.
        layers_before: Number of layers before the chunk.
        settings: The run's settings.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], layers_before: int, settings: Settings):
        self.settings, self.layers_before, self.num_layers = settings, layers_before, len(layers)
        self.kept: dict[int, torch.Tensor] = {}
        for place, layer in enumerate(layers):
            layer.register_forward_hook(
                lambda module, args, kwargs, output, place=place: self._drop(
                    module, place, args, kwargs, output
                ),
                with_kwargs=True,
            )

    def draw(self, step: int, samples: Sequence[int], platform: Platform) -> None:
        """Draw the dropped layers of the micro-batch whose forward pass is next.

        ``samples`` are the places of its samples in the global batch.
        """
        dropped = [
            [
                is_dropped(self.settings, self.layers_before + place, step, sample)
                for sample in samples
            ]
            for place in range(self.num_layers)
        ]
        kept_lb = platform.to_device(~torch.tensor(dropped))
        self.kept = {
            place: kept_lb[place] for place in range(self.num_layers) if any(dropped[place])
        }

    def _drop(self, module: torch.nn.Module, place: int, args: tuple, kwargs: dict, output):
        """Return the layer's output with its input for dropped samples; None to leave it.

        Shapes: hidden states [t, b, h], kept [b].
        """
        if not module.training or place not in self.kept:
            return None
        before = args[0] if args else kwargs["hidden_states"]
        hidden, *rest = output
        return (torch.where(self.kept[place][None, :, None], hidden, before), *rest)
