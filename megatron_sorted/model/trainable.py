"""Which parameters train; the others are frozen: no gradient, no optimizer state, the same bits after the run."""

import torch

from megatron_sorted.model.exit_parts import PARTS
from megatron_sorted.settings.lora import is_adapter
from megatron_sorted.settings.run import Settings

OWN_OF_EXITS = tuple(f"{name}." for name in (*PARTS, "exit_norms", "exit_output_layers"))


def is_trained(name: str, settings: Settings) -> bool:
    """Returns whether the parameter of this name within a stage trains."""
    is_base_frozen = settings.tune_exit or settings.lora_rank > 0
    return not is_base_frozen or is_adapter(name) or name.startswith(OWN_OF_EXITS)


def freeze_others(stage: torch.nn.Module, settings: Settings) -> None:
    """Freezes every parameter of a stage that does not train; before gradient buffers are made, which hold trained ones only.

    Notes on the stage whether anything before it trains: else no gradient need come out of it. That follows from settings alone, since
    layers are alike: those of earlier stages train if this one's do.
    """
    for name, parameter in stage.named_parameters():
        parameter.requires_grad_(is_trained(name, settings))
    layers_train = any(is_trained(name, settings) for name, _ in stage.named_parameters() if name.startswith("decoder."))
    stage.trains_below = is_trained("embedding.word_embeddings.weight", settings) or (stage.plan.first_layer > 0 and layers_train)
