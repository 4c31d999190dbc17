"""Constants of the rules that weigh exits, what stands on top of them, and dropped layers."""

from dataclasses import dataclass
from typing import Literal

from megatron_sorted.settings.field import setting


@dataclass(frozen=True)
class ExitWeightingSettings:
    """How loss coefficients of exits are learned, guarded and switched on; LayerSkip's dropped layers."""

    exit_layer_weight_scale: float = setting(
        1.0, "Weight of the exits below the last one in the rule 'layerskip' (e_scale; LayerSkip: 0.1 to 1).")
    exit_uncertainty_rate: float = setting(0.025, "Rate of the rule 'uncertainty'.")
    exit_uncertainty_variance: float = setting(0.60653066, "First e^s of the rule 'uncertainty'; by default e^-0.5.")
    exit_inverse_loss_decay: float = setting(0.9, "Decay of the moving mean of the rule 'inverse_loss'.")
    exit_dwa_window: int = setting(100, "Steps of a window of the rule 'dwa' (in the paper an epoch).")
    exit_dwa_temperature: float = setting(2.0, "Temperature of the rule 'dwa'.")
    exit_gradnorm_rate: float = setting(0.025, "Rate of the rule 'gradnorm'.")
    exit_gradnorm_alpha: float = setting(1.5, "Exponent of the rule 'gradnorm': how much larger gradients of slow exits are to be.")
    exit_simulated_sharpness: float = setting(
        10.0, "Of the rule 'simulated_exit' at the last step (it grows from 0): how much less an exit counts for each exit that lies "
        "between it and where a token leaves.")
    exit_simulated_thresholds: int = setting(5, "Thresholds that the rule 'simulated_exit' draws at each step.")
    exit_excess_rate: float = setting(0.01, "Rate of the rule 'excess_loss'.")
    exit_excess_smoothing: float = setting(1e-3, "Part of equal shares in the rule 'excess_loss'.")
    exit_reference_loss: tuple[float, ...] = setting(
        (), "Loss of a model of each exit's depth, in nats a token, for 'excess_loss' and the guard: one per exit of --exit-layer-nums, "
        "and one for the last layer.")
    exit_guard: bool = setting(False, "Hold the last exit's loss to a reference by a multiplier that is added to its coefficient.")
    exit_guard_loss: float | None = setting(None, "Reference loss of the guard; by default the last of --exit-reference-loss.")
    exit_guard_margin: float = setting(0.0, "By how much the last exit's loss may be above its reference.")
    exit_guard_rate: float = setting(0.01, "By how much the guard's multiplier moves at a step, for each nat above the reference.")
    exit_guard_decay: float = setting(0.9, "Decay of the moving mean of the last exit's loss that the guard looks at.")
    exit_guard_largest: float = setting(10.0, "Largest multiplier of the guard.")
    exit_curriculum: Literal["none", "rotation", "gradual"] = setting(
        "none", "Which exits count at a step besides the last: all; every few of them, in turn; or more and more of them, from deep to "
        "shallow (LayerSkip).")
    exit_curriculum_interval: int | None = setting(
        None, "R of the rotation: every R-th intermediate exit is on; by default one exit at a time.")
    exit_curriculum_fraction: float = setting(0.5, "Part of --train-iters over which the gradual curriculum switches exits on.")
    layer_dropout: float = setting(
        0.0, "Chance that the last layer is dropped for a sample, growing exponentially from 0 at the first layer (LayerSkip: 0.1 to 0.2).")
    layer_dropout_schedule: Literal["constant", "exponential"] = setting(
        "constant", "That chance over time: as it is (continued training, fine-tuning), or growing from 0 (from scratch).")
