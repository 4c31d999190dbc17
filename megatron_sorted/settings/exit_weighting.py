"""Settings that learn, guard and schedule the loss coefficients of exits, with their rules."""

from dataclasses import dataclass, fields
from typing import Literal

from megatron_sorted.exits.depths import listed_order
from megatron_sorted.settings.coefficient_rule import LEARNED, base_rule
from megatron_sorted.settings.field import AllSettings, flag_of, setting
from megatron_sorted.settings.require import require


@dataclass(frozen=True)
class ExitWeightingSettings:
    """Learning, guard and curriculum of the loss coefficients of exits."""

    exit_layer_weight_scale: float = setting(
        1.0,
        "For the rule 'layerskip': weight of the exits below the last one (e_scale in LayerSkip, "
        "0.1 to 1).",
    )
    exit_uncertainty_rate: float = setting(0.025, "Learning rate of the rule 'uncertainty'.")
    exit_uncertainty_variance: float = setting(
        0.60653066, "Initial variance e^s of the rule 'uncertainty'; the default is e^-0.5."
    )
    exit_inverse_loss_decay: float = setting(
        0.9, "Decay of the moving mean of losses in the rule 'inverse_loss'."
    )
    exit_dwa_window: int = setting(
        100, "Steps over which the rule 'dwa' averages losses (an epoch in the paper)."
    )
    exit_dwa_temperature: float = setting(2.0, "Temperature of the rule 'dwa'.")
    exit_gradnorm_rate: float = setting(0.025, "Learning rate of the rule 'gradnorm'.")
    exit_gradnorm_alpha: float = setting(
        1.5,
        "Exponent of the rule 'gradnorm': how much larger the gradients of slowly learning exits "
        "shall be.",
    )
    exit_simulated_sharpness: float = setting(
        10.0,
        "For the rule 'simulated_exit': how much less an exit counts for each exit between it and "
        "the one where a token leaves. It grows from 0 to this value at the last step.",
    )
    exit_simulated_thresholds: int = setting(
        5, "Number of confidence thresholds that the rule 'simulated_exit' draws at each step."
    )
    exit_excess_rate: float = setting(0.01, "Learning rate of the rule 'excess_loss'.")
    exit_excess_smoothing: float = setting(
        1e-3, "Fraction of equal shares that the rule 'excess_loss' mixes in."
    )
    exit_reference_loss: tuple[float, ...] = setting(
        (),
        "Reference losses in nats per token for 'excess_loss' and the guard: those of separate "
        "models of each exit's depth, one per exit of --exit-layer-nums and one for the last "
        "layer.",
    )
    exit_guard: bool = setting(
        False,
        "Hold the last exit's loss at a reference: add to its coefficient a multiplier that grows "
        "while the loss is above the reference.",
    )
    exit_guard_loss: float | None = setting(
        None, "Reference loss of the guard; by default the last value of --exit-reference-loss."
    )
    exit_guard_margin: float = setting(
        0.0, "How far the last exit's loss may be above its reference, in nats per token."
    )
    exit_guard_rate: float = setting(
        0.01, "Change of the guard's multiplier at each step, per nat above the reference."
    )
    exit_guard_decay: float = setting(
        0.9, "Decay of the moving mean of the last exit's loss that the guard compares."
    )
    exit_guard_largest: float = setting(10.0, "Largest multiplier of the guard.")
    exit_curriculum: Literal["none", "rotation", "gradual"] = setting(
        "none",
        "Which intermediate exits train at a step: all of them (none), every R-th of them in turn "
        "(rotation), or more and more of them, from deep to shallow (gradual, as in LayerSkip).",
    )
    exit_curriculum_interval: int | None = setting(
        None,
        "R of the rotation: every R-th intermediate exit trains; by default one exit at a time.",
    )
    exit_curriculum_fraction: float = setting(
        0.5, "Fraction of --train-iters over which the gradual curriculum switches exits on."
    )


RULE_OF_PREFIX = {
    "exit_layer_weight_scale": "layerskip",
    "exit_uncertainty_": "uncertainty",
    "exit_inverse_loss_": "inverse_loss",
    "exit_dwa_": "dwa",
    "exit_gradnorm_": "gradnorm",
    "exit_simulated_": "simulated_exit",
    "exit_excess_": "excess_loss",
}
"""{how the names of constants begin: the rule they belong to}."""
MAX_THRESHOLDS = 255
"""Largest number of thresholds of 'simulated_exit': one byte holds how many a token passes."""


def check_exit_weighting(settings: AllSettings) -> None:
    """Check that rule, references, guard and curriculum fit together.

    Raises:
        SettingsError: They do not.
    """
    _check_constants(settings)
    rule = settings.exit_layer_weight_rule
    if rule in LEARNED:
        require(
            not settings.exit_layer_weight,
            f"--exit-layer-weight: a list together with --exit-layer-weight-rule {rule}, which "
            "learns the coefficients. Give one of them.",
        )
        require(
            not settings.exit_layer_weight_init and not settings.exit_layer_weight_warmup_iters,
            f"--exit-layer-weight-init, --exit-layer-weight-warmup-iters: {rule} sets the "
            "coefficients from the first step on. Leave them out, or choose a rule of depth.",
        )
    require(
        settings.exit_simulated_thresholds <= MAX_THRESHOLDS,
        f"--exit-simulated-thresholds: {settings.exit_simulated_thresholds} is above "
        f"{MAX_THRESHOLDS}. Give fewer.",
    )
    _check_references(settings)
    _check_curriculum(settings)


def _check_constants(settings: AllSettings) -> None:
    """Check that something reads every constant that was given."""
    for field in fields(ExitWeightingSettings):
        value = getattr(settings, field.name)
        if value == field.default:
            continue
        owner = next(
            (rule for start, rule in RULE_OF_PREFIX.items() if field.name.startswith(start)), None
        )
        require(
            owner in (None, settings.exit_layer_weight_rule),
            f"{flag_of(field.name)}: {value} has no effect with --exit-layer-weight-rule "
            f"{settings.exit_layer_weight_rule}. Use {owner}, or leave it out.",
        )
        require(
            settings.exit_guard or not field.name.startswith("exit_guard_"),
            f"{flag_of(field.name)}: {value} has no effect without --exit-guard. Give that as "
            "well, or leave it out.",
        )
        for name, wanted in (
            ("exit_curriculum_interval", "rotation"),
            ("exit_curriculum_fraction", "gradual"),
        ):
            require(
                field.name != name or settings.exit_curriculum == wanted,
                f"{flag_of(name)}: {value} has no effect with --exit-curriculum "
                f"{settings.exit_curriculum}. Use {wanted}, or leave it out.",
            )


def _check_references(settings: AllSettings) -> None:
    """Check that every exit has a reference loss where a rule or the guard needs one."""
    given, needs_all = (
        settings.exit_reference_loss,
        settings.exit_layer_weight_rule == "excess_loss",
    )
    order = listed_order(settings.exit_layer_nums, settings.num_layers)
    shown = ", ".join(map(str, order))
    if needs_all or given:
        require(
            len(given) == len(order),
            f"--exit-reference-loss: {len(given)} values for {len(order)} exits (depths {shown}"
            + (f"; depth {order[len(given)]} has none" if len(given) < len(order) else "")
            + "). Give one for each, the last layer included.",
        )
    require(
        not given or needs_all or settings.exit_guard,
        "--exit-reference-loss: nothing uses it. Use --exit-layer-weight-rule excess_loss or "
        "--exit-guard, or leave it out.",
    )
    for depth, value in zip(order, given, strict=False):
        require(
            value >= 0,
            f"--exit-reference-loss: {value} of depth {depth} is negative, but a loss never is. "
            "Give nats per token.",
        )
    require(
        not settings.exit_guard or settings.exit_guard_loss is not None or bool(given),
        "--exit-guard: there is no reference loss. Give --exit-guard-loss, or "
        "--exit-reference-loss, whose last value is used.",
    )


def _check_curriculum(settings: AllSettings) -> None:
    """Check that a curriculum trains something at every step, and a guard the last exit."""
    require(
        settings.exit_curriculum_fraction <= 1,
        f"--exit-curriculum-fraction: {settings.exit_curriculum_fraction} is above 1, so some "
        "exits would never be on. Give at most 1.",
    )
    if settings.exit_curriculum == "none" and not settings.exit_guard:
        return
    source = (
        "--exit-guard"
        if settings.exit_curriculum == "none"
        else f"--exit-curriculum {settings.exit_curriculum}"
    )
    for step in (0, settings.exit_layer_weight_warmup_iters):
        require(
            base_rule(settings).coefficients(step)[settings.num_layers] > 0,
            f"{source}: the last exit counts 0 at step {step}, but it must train at every step. "
            "Give it a coefficient above 0.",
        )
    require(
        settings.exit_curriculum == "none" or settings.exit_sampling != "probabilities",
        f"--exit-curriculum {settings.exit_curriculum}: with --exit-sampling probabilities, which "
        "may draw none of the exits that are on. Use all, uniform or coefficients.",
    )
