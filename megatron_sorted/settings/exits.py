"""Which depths of the network are exits, how they are read, how much each counts, and which train at a step."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_sorted.settings.derived import exit_depths
from megatron_sorted.settings.field import AllSettings, setting
from megatron_sorted.settings.require import require
from megatron_sorted.settings.weighting import trainable_exits

CPU_CHUNK_TOKENS, DEVICE_CHUNK_TOKENS = 256, 2048


@dataclass(frozen=True)
class ExitSettings:
    """Nested exits, in EE-LLM's words (``--exit-layer-nums``: 1-based, "after layer N")."""

    exit_layer_nums: tuple[int, ...] = setting(
        (), "Depths at which the network may stop; the last layer is always an exit."
    )
    use_exit_norm: bool = setting(
        False, "Every intermediate exit has a final norm of its own instead of the shared one."
    )
    untie_exit_output_weights: bool = setting(
        False, "Every intermediate exit has an output head of its own instead of the shared one."
    )
    exit_layer_weight_rule: Literal[
        "uniform",
        "linear",
        "sum",
        "sqrt",
        "inverse",
        "inverse_sqrt",
        "layerskip",
        "uncertainty",
        "inverse_loss",
        "dwa",
        "gradnorm",
        "simulated_exit",
        "excess_loss",
    ] = setting(
        "uniform",
        "Loss coefficient of each exit, normalised to sum 1: a function of depth (uniform: the mean, SoFT), or, from "
        "'uncertainty' on, learned from what the exits say (docs/exit_weights.md).",
    )
    exit_layer_weight: tuple[float, ...] = setting(
        (),
        "Loss coefficients instead of a rule, one per exit of --exit-layer-nums (the last exit then counts 1) or one more for the last "
        "exit; used as given. "
        "An exit with coefficient 0 is not trained, only evaluated.",
    )
    exit_layer_weight_init: tuple[float, ...] = setting(
        (),
        "Coefficients at step 0, moved to the final ones during the warm-up (larger than the final ones: a cool-down). One per exit, "
        "with or without the last. Default 0.",
    )
    exit_layer_weight_warmup_iters: int = setting(
        0,
        "Steps over which coefficients move from --exit-layer-weight-init to their final values; 0: no warm-up.",
    )
    exit_layer_weight_warmup_style: Literal["linear", "cosine"] = setting(
        "linear", "Shape of the warm-up."
    )
    exit_sampling: Literal["all", "uniform", "probabilities", "coefficients"] = setting(
        "all",
        "Which exits train at a step: all (SoFT), or some drawn anew at each step (SortedNet), uniformly, with "
        "--exit-probabilities, or with the loss coefficients as probabilities (a drawn exit then counts as often as it is drawn).",
    )
    num_sampled_exits: int = setting(
        1,
        "How many exits are drawn per step when --exit-sampling is not 'all'; without replacement, but for 'coefficients'.",
    )
    exit_probabilities: tuple[float, ...] = setting(
        (), "Probability of each exit, the last included, for --exit-sampling probabilities."
    )
    exit_loss_chunk_tokens: int | None = setting(
        None,
        "Tokens whose logits exist at one time when an exit's loss is computed; by default "
        f"{CPU_CHUNK_TOKENS} on cpu and {DEVICE_CHUNK_TOKENS} on GPUs.",
    )


def loss_chunk_tokens(settings: ExitSettings, on_cpu: bool) -> int:
    """Return how many tokens' logits exist at one time when an exit's loss is computed."""
    return settings.exit_loss_chunk_tokens or (CPU_CHUNK_TOKENS if on_cpu else DEVICE_CHUNK_TOKENS)


def check_exits(settings: AllSettings) -> None:
    """Returns nothing if depths, coefficients and sampling fit together.

    Raises:
        SettingsError: they do not.
    """
    require(
        not settings.exit_layer_weight or settings.exit_layer_weight_rule == "uniform",
        f"--exit-layer-weight-rule: {settings.exit_layer_weight_rule} beside a list (--exit-layer-weight). Give one of them.",
    )
    if settings.exit_sampling == "probabilities":
        _check_probabilities(settings)
    else:
        require(
            not settings.exit_probabilities,
            f"--exit-probabilities: not used with --exit-sampling {settings.exit_sampling}. Leave them out or use 'probabilities'.",
        )
    if settings.exit_sampling == "all":
        return
    trainable = trainable_exits(settings)
    require(
        settings.num_sampled_exits <= len(trainable),
        f"--num-sampled-exits: {settings.num_sampled_exits} of {len(trainable)} exits that can be drawn (coefficient and probability "
        "above 0). Lower it.",
    )
    # during a warm-up an exit may count 0 for a while; then somebody else must train
    require(
        bool(set(trainable_exits(settings, 0)) & set(trainable)),
        "--exit-layer-weight-init: at step 0 every exit that can be drawn counts 0, so nothing would be trained. Start one above 0.",
    )


def _check_probabilities(settings: AllSettings) -> None:
    values, depths = settings.exit_probabilities, exit_depths(settings)
    require(
        len(values) == len(depths),
        f"--exit-probabilities: {len(values)} values for {len(depths)} exits (depths {', '.join(map(str, depths))}, the last layer "
        "included). "
        "Give one for each.",
    )
    for value in values:
        require(value >= 0, f"--exit-probabilities: {value} is negative. Give 0 or more.")
    total = math.fsum(values)
    require(
        abs(total - 1) <= 1e-6,
        f"--exit-probabilities: they sum to {total:.8g}, not 1. Divide each by the sum.",
    )
