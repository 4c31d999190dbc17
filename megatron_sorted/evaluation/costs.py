"""Parameters and operations of a sub-model, counted from its modules."""

from torch import nn


def count_parameters(sub_model: nn.Module) -> int:
    """Returns the number of different parameters: a matrix used as embedding and as head counts once."""
    return sum(parameter.numel() for parameter in {id(parameter): parameter for parameter in sub_model.parameters()}.values())


def forward_flops_per_token(sub_model: nn.Module, seq_length: int) -> int:
    """Returns operations of a forward pass for one token, a multiply-add counting 2.

    Twice the weights of every linear layer and of the head, and for attention 2 x 2 x (mean tokens attended to) x (width of all query
    heads): scores and values, with a mean of half the sequence, as ``settings.costs``; less where a layer's window is shorter.
    """
    config = sub_model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    linear = sum(module.in_features * module.out_features for module in sub_model.modules() if isinstance(module, nn.Linear))
    attended = sum(_mean_attended(seq_length, window) for window in _windows(config))
    return round(2 * linear + 4 * attended * config.num_attention_heads * head_dim)


def _windows(config) -> list[int | None]:
    """Returns how far every layer looks back; None: without limit."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _mean_attended(length: int, window: int | None) -> float:
    return length / 2 if window is None or window >= length else window - window * window / (2 * length)
