"""The rule that gives every exit its loss coefficient, built from the settings."""

from collections.abc import Callable

from megatron_sorted.exits.coefficients import CoefficientRule, Weighting, make_coefficient_rule
from megatron_sorted.exits.curriculum import Curriculum, gradual, rotation
from megatron_sorted.exits.depths import by_depth
from megatron_sorted.exits.gradient_norm import GradNorm
from megatron_sorted.exits.guard import Guard
from megatron_sorted.exits.learned import LearnedRule
from megatron_sorted.exits.rules_from_losses import ExcessLoss, InverseLoss, LossRatio, Uncertainty
from megatron_sorted.exits.simulated_exit import SimulatedExit
from megatron_sorted.settings.derived import exit_depths, exit_probabilities, step_coefficients
from megatron_sorted.settings.field import AllSettings


def reference_losses(settings: AllSettings) -> dict[int, float]:
    """Return {depth: loss of --exit-reference-loss}; `check_exit_weighting` has passed the list."""
    return by_depth(
        "--exit-reference-loss",
        settings.exit_reference_loss,
        settings.exit_layer_nums,
        settings.num_layers,
    )


LEARNED: dict[str, Callable[[AllSettings], LearnedRule]] = {
    "uncertainty": lambda s: Uncertainty(
        exit_depths(s), s.exit_uncertainty_rate, s.exit_uncertainty_variance
    ),
    "inverse_loss": lambda s: InverseLoss(exit_depths(s), s.exit_inverse_loss_decay),
    "dwa": lambda s: LossRatio(exit_depths(s), s.exit_dwa_window, s.exit_dwa_temperature),
    "gradnorm": lambda s: GradNorm(exit_depths(s), s.exit_gradnorm_rate, s.exit_gradnorm_alpha),
    "simulated_exit": lambda s: SimulatedExit(
        exit_depths(s),
        max(s.train_iters, 1),
        s.exit_simulated_sharpness,
        s.exit_simulated_thresholds,
        s.seed,
    ),
    "excess_loss": lambda s: ExcessLoss(
        exit_depths(s), reference_losses(s), s.exit_excess_rate, s.exit_excess_smoothing
    ),
}
"""{name in --exit-layer-weight-rule: how a rule that learns is built from the settings}."""


def base_rule(settings: AllSettings) -> CoefficientRule:
    """Return the rule without curriculum and guard."""
    if settings.exit_layer_weight_rule in LEARNED and not settings.exit_layer_weight:
        return LEARNED[settings.exit_layer_weight_rule](settings)
    weighting = Weighting(
        settings.exit_layer_weight_rule,
        settings.exit_layer_weight,
        settings.exit_layer_weight_init,
        settings.exit_layer_weight_warmup_iters,
        settings.exit_layer_weight_warmup_style,
        settings.exit_layer_weight_scale,
    )
    return make_coefficient_rule(settings.exit_layer_nums, settings.num_layers, weighting)


def coefficient_rule(settings: AllSettings) -> CoefficientRule:
    """Return the rule that gives every exit its coefficient at a step.

    It is the base rule, then the curriculum, then the guard.
    """
    rule, depths = base_rule(settings), exit_depths(settings)
    if settings.exit_curriculum == "rotation":
        rule = Curriculum(
            rule, rotation(depths, settings.exit_curriculum_interval or max(len(depths) - 1, 1))
        )
    elif settings.exit_curriculum == "gradual":
        rule = Curriculum(
            rule, gradual(depths, settings.exit_curriculum_fraction * settings.train_iters)
        )
    if settings.exit_guard:
        reference = settings.exit_guard_loss
        if reference is None:
            reference = reference_losses(settings)[settings.num_layers]
        rule = Guard(
            rule,
            settings.num_layers,
            reference + settings.exit_guard_margin,
            settings.exit_guard_rate,
            settings.exit_guard_decay,
            settings.exit_guard_largest,
        )
    return rule


def trainable_exits(settings: AllSettings, step: int | None = None) -> list[int]:
    """Return the depths of the exits that can train, in increasing order.

    Their coefficient and probability are above 0. Curriculum and guard are left out: a curriculum
    switches exits off for a while only.

    Args:
        settings: The run.
        step: The step of the warm-up of the coefficients; None for its end.
    """
    step = settings.exit_layer_weight_warmup_iters if step is None else step
    coefficients, probabilities = (
        step_coefficients(settings, base_rule(settings), step),
        exit_probabilities(settings),
    )
    return [
        depth
        for depth in exit_depths(settings)
        if coefficients[depth] > 0 and probabilities[depth] > 0
    ]
