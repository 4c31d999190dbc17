"""Which depths of the network are exits, how they are read, and how much each counts."""

from dataclasses import dataclass
from typing import Literal

from megatron_sorted.settings.field import setting


@dataclass(frozen=True)
class ExitSettings:
    """Nested exits, in EE-LLM's words (``--exit-layer-nums``: 1-based, "after layer N")."""

    exit_layer_nums: tuple[int, ...] = setting((), "Depths at which the network may stop; the last layer is always an exit.")
    use_exit_norm: bool = setting(False, "Every intermediate exit has a final norm of its own instead of the shared one.")
    untie_exit_output_weights: bool = setting(False, "Every intermediate exit has an output head of its own instead of the shared one.")
    exit_layer_weight_rule: Literal[
        "uniform", "linear", "sum", "sqrt", "inverse", "inverse_sqrt", "layerskip",
        "uncertainty", "inverse_loss", "dwa", "gradnorm", "simulated_exit", "excess_loss"] = setting(
        "uniform", "Loss coefficient of each exit, normalised to sum 1: a function of depth (uniform: the mean, SoFT), or, from "
        "'uncertainty' on, learned from what the exits say (docs/exit_weights.md).")
    exit_layer_weight: tuple[float, ...] = setting(
        (),
        "Loss coefficients instead of a rule, one per exit of --exit-layer-nums (the last exit then counts 1) or one more for the last "
        "exit; used as given. "
        "An exit with coefficient 0 is not trained, only evaluated.")
    exit_layer_weight_init: tuple[float, ...] = setting(
        (),
        "Coefficients at step 0, moved to the final ones during the warm-up (larger than the final ones: a cool-down). One per exit, "
        "with or without the last. Default 0.")
    exit_layer_weight_warmup_iters: int = setting(
        0, "Steps over which coefficients move from --exit-layer-weight-init to their final values; 0: no warm-up.")
    exit_layer_weight_warmup_style: Literal["linear", "cosine"] = setting("linear", "Shape of the warm-up.")
    exit_sampling: Literal["all", "uniform", "probabilities", "coefficients"] = setting(
        "all", "Which exits train at a step: all (SoFT), or some drawn anew at each step (SortedNet), uniformly, with "
        "--exit-probabilities, or with the loss coefficients as probabilities (a drawn exit then counts as often as it is drawn).")
    num_sampled_exits: int = setting(
        1, "How many exits are drawn per step when --exit-sampling is not 'all'; without replacement, but for 'coefficients'.")
    exit_probabilities: tuple[float, ...] = setting((), "Probability of each exit, the last included, for --exit-sampling probabilities.")
    exit_loss_chunk_tokens: int | None = setting(
        None, "Tokens whose logits exist at one time when an exit's loss is computed; by default 256 on cpu and 2048 on GPUs.")
