"""Rules between the rule that weighs exits, its constants, and what stands on top of it."""

from dataclasses import fields

from megatron_sorted.settings.exit_weighting import ExitWeightingSettings
from megatron_sorted.settings.flags import flag_of
from megatron_sorted.settings.require import require
from megatron_sorted.settings.run import Settings
from megatron_sorted.settings.weighting import LEARNED, base_rule

OWNERS = {
    "exit_layer_weight_scale": "layerskip",
    "exit_uncertainty_": "uncertainty",
    "exit_inverse_loss_": "inverse_loss",
    "exit_dwa_": "dwa",
    "exit_gradnorm_": "gradnorm",
    "exit_simulated_": "simulated_exit",
    "exit_excess_": "excess_loss",
}
"""Beginning of a constant's name -> the rule it belongs to."""
OUT_OF_REACH_THRESHOLDS = 255
"""Of 'simulated_exit': how many of them a token's confidence passes is kept in one byte."""


def check_exit_weighting(settings: Settings) -> None:
    """Returns nothing if rule, references, guard, curriculum and dropped layers fit together.

    Raises:
        SettingsError: they do not.
    """
    _check_constants(settings)
    rule = settings.exit_layer_weight_rule
    if rule in LEARNED:
        require(
            not settings.exit_layer_weight,
            f"--exit-layer-weight: a list beside --exit-layer-weight-rule {rule}, which learns the coefficients. Give one of them.",
        )
        require(
            not settings.exit_layer_weight_init and not settings.exit_layer_weight_warmup_iters,
            f"--exit-layer-weight-init, --exit-layer-weight-warmup-iters: {rule} sets the coefficients from the first step on. "
            "Leave them out, or take a rule of depth.",
        )
    require(
        settings.exit_simulated_thresholds <= OUT_OF_REACH_THRESHOLDS,
        f"--exit-simulated-thresholds: {settings.exit_simulated_thresholds} is above {OUT_OF_REACH_THRESHOLDS}. Give fewer.",
    )
    _check_references(settings)
    _check_curriculum(settings)
    _check_layer_dropout(settings)


def _check_constants(settings: Settings) -> None:
    """Returns nothing if no constant was given that nothing looks at."""
    for field in fields(ExitWeightingSettings):
        value = getattr(settings, field.name)
        if value == field.default:
            continue
        owner = next((rule for start, rule in OWNERS.items() if field.name.startswith(start)), None)
        require(
            owner in (None, settings.exit_layer_weight_rule),
            f"{flag_of(field.name)}: {value} has no effect with --exit-layer-weight-rule {settings.exit_layer_weight_rule}. "
            f"Use {owner}, or leave it out.",
        )
        require(
            settings.exit_guard or not field.name.startswith("exit_guard_"),
            f"{flag_of(field.name)}: {value} has no effect without --exit-guard. Give that as well, or leave it out.",
        )
        for name, wanted in (("exit_curriculum_interval", "rotation"), ("exit_curriculum_fraction", "gradual")):
            require(
                field.name != name or settings.exit_curriculum == wanted,
                f"{flag_of(name)}: {value} has no effect with --exit-curriculum {settings.exit_curriculum}. "
                f"Use {wanted}, or leave it out.",
            )
        require(
            field.name != "layer_dropout_schedule" or settings.layer_dropout > 0,
            f"--layer-dropout-schedule: {value} has no effect without --layer-dropout. Give that as well, or leave it out.",
        )


def _check_references(settings: Settings) -> None:
    """Returns nothing if every exit has a reference loss where one is asked for."""
    given, needs_all = settings.exit_reference_loss, settings.exit_layer_weight_rule == "excess_loss"
    order = [*settings.exit_layer_nums]
    order += [] if settings.num_layers in order else [settings.num_layers]
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
        "--exit-reference-loss: nothing looks at it. Use --exit-layer-weight-rule excess_loss or --exit-guard, or leave it out.",
    )
    for depth, value in zip(order, given, strict=False):
        require(value >= 0, f"--exit-reference-loss: {value} of depth {depth} is negative, which no loss is. Give nats a token.")
    require(
        not settings.exit_guard or settings.exit_guard_loss is not None or bool(given),
        "--exit-guard: there is no loss to hold. Give --exit-guard-loss, or --exit-reference-loss whose last value is meant.",
    )


def _check_curriculum(settings: Settings) -> None:
    """Returns nothing if something trains at every step of a curriculum, and always under a guard."""
    require(
        settings.exit_curriculum_fraction <= 1,
        f"--exit-curriculum-fraction: {settings.exit_curriculum_fraction} is above 1, so some exits would never be on. Give at most 1.",
    )
    if settings.exit_curriculum == "none" and not settings.exit_guard:
        return
    user = "--exit-guard" if settings.exit_curriculum == "none" else f"--exit-curriculum {settings.exit_curriculum}"
    for step in (0, settings.exit_layer_weight_warmup_iters):
        require(
            base_rule(settings).coefficients(step)[settings.num_layers] > 0,
            f"{user}: the last exit counts 0 at step {step}, but it is the one that must train. Give it a coefficient above 0.",
        )
    require(
        settings.exit_curriculum == "none" or settings.exit_sampling != "probabilities",
        f"--exit-curriculum {settings.exit_curriculum}: beside --exit-sampling probabilities, which may draw none of the exits that are "
        "on. Use all, uniform or coefficients.",
    )


def _check_layer_dropout(settings: Settings) -> None:
    """Returns nothing if a dropped layer is the same layer in forward and backward."""
    require(
        settings.layer_dropout == 0 or settings.recompute_granularity != "full",
        f"--layer-dropout: {settings.layer_dropout} beside --recompute-granularity full, which runs layers a second time in backward, when "
        "the draw of their micro-batch is gone. Use selective or none.",
    )
    require(
        settings.layer_dropout == 0 or settings.num_layers > 1,
        f"--layer-dropout: {settings.layer_dropout} in a network of one layer, whose chance is that of the first layer, 0. Leave it out.",
    )
