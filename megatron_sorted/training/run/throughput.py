"""The operations of a step, and the rate at which the devices do them."""

from collections.abc import Collection

from megatron_sorted.model.config import parameter_dtype
from megatron_sorted.platform.contract import Platform
from megatron_sorted.settings.costs import forward_flops_per_token, train_flops_per_token
from megatron_sorted.settings.derived import deepest_layer_run, global_batch_size, taught_exits
from megatron_sorted.settings.run import Settings


def step_flops(
    settings: Settings,
    vocab_size: int,
    world_size: int,
    depths: Collection[int],
    teacher: Settings | None = None,
) -> int:
    """Return the operations of one step over all devices that trains the exits at ``depths``.

    They are forward and backward of the layers that are run and of these exits' heads, for every
    position of every sample. Causal attention counts half the square, over the whole sample also
    where documents are packed. An exit that is taught needs its teacher's logits too, and a frozen
    teacher the forward of its layers. Not counted are what is recomputed to save memory, and the
    backward of frozen layers, which does not exist.

    Args:
        settings: The run.
        vocab_size: Number of real tokens, before padding.
        world_size: Number of ranks.
        depths: The exits that train.
        teacher: The settings of a frozen teacher; None without one.
    """
    tokens = global_batch_size(settings, world_size) * settings.seq_length
    per_token = train_flops_per_token(
        settings, vocab_size, depths, deepest_layer_run(settings, depths)
    )
    head = 2 * settings.hidden_size * vocab_size
    layers = (
        forward_flops_per_token(teacher, vocab_size)[teacher.num_layers] - head if teacher else 0
    )
    return tokens * (per_token + len(taught_exits(settings, depths)) * head + layers)


def tflops_per_device(flops: float, seconds: float, world_size: int) -> float:
    """Return the rate of one device, in 10^12 operations a second.

    >>> tflops_per_device(4e14, seconds=2.0, world_size=8)
    25.0

    Args:
        flops: Operations of all devices together.
        seconds: Time in which they were done.
        world_size: Number of devices.
    """
    return flops / max(seconds, 1e-9) / world_size / 1e12


def device_peak_tflops(settings: Settings, platform: Platform) -> float | None:
    """Return the peak rate of one device at the run's precision.

    It is the one in the settings, else the published one; None if unknown.
    """
    return settings.device_peak_tflops or platform.peak_tflops(parameter_dtype(settings))


def model_flops_utilisation(tflops: float, peak: float | None) -> float | None:
    """Return MFU, the share of the peak rate that the counted operations reach.

    Source: Chowdhery et al., arXiv 2204.02311, appendix B.
    """
    return None if peak is None else tflops / peak
