"""How loss coefficients of exits are learned, guarded and scheduled."""

from dataclasses import dataclass, fields
from typing import Literal

from megatron_sorted.settings.field import AllSettings, flag_of, setting
from megatron_sorted.settings.require import require
from megatron_sorted.settings.weighting import LEARNED, base_rule


@dataclass(frozen=True)
class ExitWeightingSettings:
    """How loss coefficients of exits are learned, guarded and switched on; LayerSkip's dropped layers."""

    exit_layer_weight_scale: float = setting(
        1.0,
        "Weight of the exits below the last one in the rule 'layerskip' (e_scale; LayerSkip: 0.1 to 1).",
    )
    exit_uncertainty_rate: float = setting(0.025, "Rate of the rule 'uncertainty'.")
    exit_uncertainty_variance: float = setting(
        0.60653066, "First e^s of the rule 'uncertainty'; by default e^-0.5."
    )
    exit_inverse_loss_decay: float = setting(
        0.9, "Decay of the moving mean of the rule 'inverse_loss'."
    )
    exit_dwa_window: int = setting(
        100, "Steps of a window of the rule 'dwa' (in the paper an epoch)."
    )
    exit_dwa_temperature: float = setting(2.0, "Temperature of the rule 'dwa'.")
    exit_gradnorm_rate: float = setting(0.025, "Rate of the rule 'gradnorm'.")
    exit_gradnorm_alpha: float = setting(
        1.5, "Exponent of the rule 'gradnorm': how much larger gradients of slow exits are to be."
    )
    exit_simulated_sharpness: float = setting(
        10.0,
        "Of the rule 'simulated_exit' at the last step (it grows from 0): how much less an exit counts for each exit that lies "
        "between it and where a token leaves.",
    )
    exit_simulated_thresholds: int = setting(
        5, "Thresholds that the rule 'simulated_exit' draws at each step."
    )
    exit_excess_rate: float = setting(0.01, "Rate of the rule 'excess_loss'.")
    exit_excess_smoothing: float = setting(1e-3, "Part of equal shares in the rule 'excess_loss'.")
    exit_reference_loss: tuple[float, ...] = setting(
        (),
        "Loss of a model of each exit's depth, in nats a token, for 'excess_loss' and the guard: one per exit of --exit-layer-nums, "
        "and one for the last layer.",
    )
    exit_guard: bool = setting(
        False,
        "Hold the last exit's loss to a reference by a multiplier that is added to its coefficient.",
    )
    exit_guard_loss: float | None = setting(
        None, "Reference loss of the guard; by default the last of --exit-reference-loss."
    )
    exit_guard_margin: float = setting(
        0.0, "By how much the last exit's loss may be above its reference."
    )
    exit_guard_rate: float = setting(
        0.01,
        "By how much the guard's multiplier moves at a step, for each nat above the reference.",
    )
    exit_guard_decay: float = setting(
        0.9, "Decay of the moving mean of the last exit's loss that the guard looks at."
    )
    exit_guard_largest: float = setting(10.0, "Largest multiplier of the guard.")
    exit_curriculum: Literal["none", "rotation", "gradual"] = setting(
        "none",
        "Which exits count at a step besides the last: all; every few of them, in turn; or more and more of them, from deep to "
        "shallow (LayerSkip).",
    )
    exit_curriculum_interval: int | None = setting(
        None,
        "R of the rotation: every R-th intermediate exit is on; by default one exit at a time.",
    )
    exit_curriculum_fraction: float = setting(
        0.5, "Part of --train-iters over which the gradual curriculum switches exits on."
    )
    layer_dropout: float = setting(
        0.0,
        "Chance that the last layer is dropped for a sample, growing exponentially from 0 at the first layer (LayerSkip: 0.1 to 0.2).",
    )
    layer_dropout_schedule: Literal["constant", "exponential"] = setting(
        "constant",
        "That chance over time: as it is (continued training, fine-tuning), or growing from 0 (from scratch).",
    )


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


def check_exit_weighting(settings: AllSettings) -> None:
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


def _check_constants(settings: AllSettings) -> None:
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
        for name, wanted in (
            ("exit_curriculum_interval", "rotation"),
            ("exit_curriculum_fraction", "gradual"),
        ):
            require(
                field.name != name or settings.exit_curriculum == wanted,
                f"{flag_of(name)}: {value} has no effect with --exit-curriculum {settings.exit_curriculum}. "
                f"Use {wanted}, or leave it out.",
            )
        require(
            field.name != "layer_dropout_schedule" or settings.layer_dropout > 0,
            f"--layer-dropout-schedule: {value} has no effect without --layer-dropout. Give that as well, or leave it out.",
        )


def _check_references(settings: AllSettings) -> None:
    """Returns nothing if every exit has a reference loss where one is asked for."""
    given, needs_all = (
        settings.exit_reference_loss,
        settings.exit_layer_weight_rule == "excess_loss",
    )
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
        require(
            value >= 0,
            f"--exit-reference-loss: {value} of depth {depth} is negative, which no loss is. Give nats a token.",
        )
    require(
        not settings.exit_guard or settings.exit_guard_loss is not None or bool(given),
        "--exit-guard: there is no loss to hold. Give --exit-guard-loss, or --exit-reference-loss whose last value is meant.",
    )


def _check_curriculum(settings: AllSettings) -> None:
    """Returns nothing if something trains at every step of a curriculum, and always under a guard."""
    require(
        settings.exit_curriculum_fraction <= 1,
        f"--exit-curriculum-fraction: {settings.exit_curriculum_fraction} is above 1, so some exits would never be on. Give at most 1.",
    )
    if settings.exit_curriculum == "none" and not settings.exit_guard:
        return
    user = (
        "--exit-guard"
        if settings.exit_curriculum == "none"
        else f"--exit-curriculum {settings.exit_curriculum}"
    )
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


def _check_layer_dropout(settings: AllSettings) -> None:
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
