"""Settings of the exits: depths, what reads them, coefficients and sampling, with their rules."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_sorted.settings.coefficient_rule import trainable_exits
from megatron_sorted.settings.derived import exit_depths
from megatron_sorted.settings.field import AllSettings, setting
from megatron_sorted.settings.require import require

CPU_CHUNK_TOKENS, DEVICE_CHUNK_TOKENS = 256, 2048


@dataclass(frozen=True)
class ExitSettings:
    """Nested exits, named as in EE-LLM (``--exit-layer-nums``: 1-based, "after layer N")."""

    exit_layer_nums: tuple[int, ...] = setting(
        (),
        "Depths (numbers of layers) at which the network has an exit; the last layer always is "
        "one.",
    )
    use_exit_norm: bool = setting(
        False, "Give every intermediate exit a final norm of its own instead of the shared one."
    )
    untie_exit_output_weights: bool = setting(
        False, "Give every intermediate exit an output head of its own instead of the shared one."
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
        "Rule for the loss coefficient of each exit, normalised to sum 1: a function of depth "
        "(uniform: the mean, SoFT) or, from 'uncertainty' on, learned from the losses and "
        "gradients of the exits (docs/exit_weights.md).",
    )
    exit_layer_weight: tuple[float, ...] = setting(
        (),
        "Loss coefficients instead of a rule, used as given: one per exit of --exit-layer-nums "
        "(the last exit then counts 1), or one more for the last exit. An exit with coefficient 0 "
        "is evaluated but not trained.",
    )
    exit_layer_weight_init: tuple[float, ...] = setting(
        (),
        "Coefficients at step 0, which move to the final ones during the warm-up (or cool-down, "
        "if they are larger). One per exit, with or without the last; by default 0.",
    )
    exit_layer_weight_warmup_iters: int = setting(
        0,
        "Steps over which coefficients move from --exit-layer-weight-init to their final values; "
        "0: no warm-up.",
    )
    exit_layer_weight_warmup_style: Literal["linear", "cosine"] = setting(
        "linear", "Shape of the warm-up of the coefficients."
    )
    exit_sampling: Literal["all", "uniform", "probabilities", "coefficients"] = setting(
        "all",
        "Which exits train at a step: all (SoFT), or some that are drawn at each step "
        "(SortedNet): uniformly, with --exit-probabilities, or with the loss coefficients as "
        "probabilities (an exit then counts as often as it is drawn).",
    )
    num_sampled_exits: int = setting(
        1,
        "Number of exits drawn per step when --exit-sampling is not 'all'; without replacement, "
        "except for 'coefficients'.",
    )
    exit_probabilities: tuple[float, ...] = setting(
        (), "Probability of each exit, the last included, for --exit-sampling probabilities."
    )
    exit_loss_chunk_tokens: int | None = setting(
        None,
        "Number of tokens whose logits exist at one time when an exit's loss is computed; by "
        f"default {CPU_CHUNK_TOKENS} on cpu and {DEVICE_CHUNK_TOKENS} on GPUs.",
    )


def loss_chunk_tokens(settings: ExitSettings, on_cpu: bool) -> int:
    """Return how many tokens' logits exist at one time when an exit's loss is computed."""
    return settings.exit_loss_chunk_tokens or (CPU_CHUNK_TOKENS if on_cpu else DEVICE_CHUNK_TOKENS)


def check_exits(settings: AllSettings) -> None:
    """Check that depths, coefficients and sampling fit together.

    Raises:
        SettingsError: They do not.
    """
    exit_depths(settings)  # raises where a depth is no layer, or is listed twice
    require(
        not settings.exit_layer_weight or settings.exit_layer_weight_rule == "uniform",
        f"--exit-layer-weight-rule: {settings.exit_layer_weight_rule} together with a list "
        "(--exit-layer-weight). Give one of them.",
    )
    if settings.exit_sampling == "probabilities":
        _check_probabilities(settings)
    else:
        require(
            not settings.exit_probabilities,
            f"--exit-probabilities: not used with --exit-sampling {settings.exit_sampling}. Leave "
            "them out or use --exit-sampling probabilities.",
        )
    if settings.exit_sampling == "all":
        return
    trainable = trainable_exits(settings)
    require(
        settings.num_sampled_exits <= len(trainable),
        f"--num-sampled-exits: {settings.num_sampled_exits} of {len(trainable)} exits that can be "
        "drawn (coefficient and probability above 0). Lower it.",
    )
    # an exit may count 0 at the beginning of a warm-up; another one must train then
    require(
        bool(set(trainable_exits(settings, 0)) & set(trainable)),
        "--exit-layer-weight-init: at step 0 every exit that can be drawn counts 0, so nothing "
        "would be trained. Start one above 0.",
    )


def _check_probabilities(settings: AllSettings) -> None:
    values, depths = settings.exit_probabilities, exit_depths(settings)
    require(
        len(values) == len(depths),
        f"--exit-probabilities: {len(values)} values for {len(depths)} exits (depths "
        f"{', '.join(map(str, depths))}, the last layer included). Give one for each.",
    )
    for value in values:
        require(value >= 0, f"--exit-probabilities: {value} is negative. Give 0 or more.")
    total = math.fsum(values)
    require(
        abs(total - 1) <= 1e-6,
        f"--exit-probabilities: they sum to {total:.8g}, not 1. Divide each by the sum.",
    )
