"""Which parameters train; the others are frozen: no gradient, no optimizer state, the same bits after the run."""

import torch

from megatron_sorted.settings.lora import is_adapter
from megatron_sorted.settings.run import Settings


def is_trained(name: str, settings: Settings) -> bool:
    """Returns whether the parameter of this name within a stage trains."""
    return not settings.lora_rank or is_adapter(name) or name.startswith("exit_")


def freeze_others(stage: torch.nn.Module, settings: Settings) -> None:
    """Freezes every parameter of a stage that does not train; before gradient buffers are made, which hold trained ones only."""
    for name, parameter in stage.named_parameters():
        parameter.requires_grad_(is_trained(name, settings))
