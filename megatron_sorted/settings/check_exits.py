"""Rules between exits, their coefficients and which of them train at a step."""

import math

from megatron_sorted.settings.derived import coefficient_rule, exit_depths, exit_probabilities, step_coefficients
from megatron_sorted.settings.require import require
from megatron_sorted.settings.run import Settings


def check_exits(settings: Settings) -> None:
    """Returns nothing if depths, coefficients and sampling fit together.

    Raises:
        SettingsError: they do not.
    """
    depths = exit_depths(settings)
    require(
        not settings.exit_layer_weight or settings.exit_layer_weight_rule == "uniform",
        f"--exit-layer-weight-rule: {settings.exit_layer_weight_rule} beside a list (--exit-layer-weight). Give one of them.",
    )
    final = step_coefficients(settings, coefficient_rule(settings), settings.exit_layer_weight_warmup_iters)
    trainable = {depth for depth in depths if final[depth] > 0}
    if settings.exit_sampling == "probabilities":
        trainable = {depth for depth, probability in _checked_probabilities(settings).items() if probability > 0} & trainable
    else:
        require(
            not settings.exit_probabilities,
            f"--exit-probabilities: not used with --exit-sampling {settings.exit_sampling}. Leave them out or use 'probabilities'.",
        )
    if settings.exit_sampling == "all":
        return
    require(
        settings.num_sampled_exits <= len(trainable),
        f"--num-sampled-exits: {settings.num_sampled_exits} of {len(trainable)} exits that can be drawn (coefficient and probability "
        "above 0). Lower it.",
    )
    # during a warm-up an exit may count 0 for a while; then somebody else must train
    initial = step_coefficients(settings, coefficient_rule(settings), 0)
    require(
        any(initial[depth] > 0 for depth in trainable),
        "--exit-layer-weight-init: at step 0 every exit that can be drawn counts 0, so nothing would be trained. Start one above 0.",
    )


def _checked_probabilities(settings: Settings) -> dict[int, float]:
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
    return exit_probabilities(settings)
