"""Rules between exits, their coefficients and which of them train at a step."""

import math

from megatron_sorted.settings.derived import exit_depths
from megatron_sorted.settings.require import require
from megatron_sorted.settings.run import Settings
from megatron_sorted.settings.weighting import trainable_exits


def check_exits(settings: Settings) -> None:
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


def _check_probabilities(settings: Settings) -> None:
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
    require(abs(total - 1) <= 1e-6, f"--exit-probabilities: they sum to {total:.8g}, not 1. Divide each by the sum.")
