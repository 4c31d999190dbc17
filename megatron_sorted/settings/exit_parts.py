"""What an intermediate exit may own besides a norm and a head, and whether anything else trains."""

from dataclasses import dataclass

from megatron_sorted.exits.depths import by_depth
from megatron_sorted.settings.derived import exit_depths, step_coefficients
from megatron_sorted.settings.field import AllSettings, setting
from megatron_sorted.settings.require import require
from megatron_sorted.settings.weighting import coefficient_rule


@dataclass(frozen=True)
class ExitPartSettings:
    """Parts between an exit's hidden state and its norm, in EE-LLM's words where it has them; the last exit never has any."""

    use_exit_block: bool = setting(
        False,
        "Every intermediate exit has a layer of its own before its norm (Balcony); it begins as a copy of the last one.",
    )
    use_exit_mlp: bool = setting(
        False,
        "Every intermediate exit has a normed MLP of its own before its norm (EE-Tuning); it begins as a copy of the last layer's.",
    )
    exit_adapter_rank: int = setting(
        0,
        "Rank of a low-rank adapter that every intermediate exit adds to its hidden state before its norm; 0: none. It begins at zero.",
    )
    tune_exit: bool = setting(
        False, "Train only what the intermediate exits own; all else is frozen and keeps its bits."
    )


def check_exit_parts(settings: AllSettings) -> None:
    """Returns nothing if exits can have the parts asked for, and something is left to train.

    Raises:
        SettingsError: they cannot, or there is not.
    """
    has_intermediate = len(exit_depths(settings)) > 1
    for flag, given in (
        ("--use-exit-block", settings.use_exit_block),
        ("--use-exit-mlp", settings.use_exit_mlp),
        ("--exit-adapter-rank", settings.exit_adapter_rank),
    ):
        require(
            not given or has_intermediate,
            f"{flag}: there is no intermediate exit to have it, and the last one never has. Name some with --exit-layer-nums.",
        )
    require(
        not (settings.use_exit_block and settings.use_exit_mlp),
        "--use-exit-block, --use-exit-mlp: a block has an MLP of its own. Give one of them.",
    )
    require(
        settings.exit_adapter_rank <= settings.hidden_size,
        f"--exit-adapter-rank: {settings.exit_adapter_rank} is above --hidden-size {settings.hidden_size}, so it is not low. Lower it.",
    )
    require(
        settings.num_experts is None or not (settings.use_exit_block or settings.use_exit_mlp),
        f"--use-exit-block, --use-exit-mlp: not done with experts (--num-experts {settings.num_experts}): the router's losses belong to "
        "layers of the network. Use --exit-adapter-rank, or own norms and heads.",
    )
    if settings.tune_exit:
        _check_tuning(settings, has_intermediate)


def _check_tuning(settings: AllSettings, has_intermediate: bool) -> None:
    last = settings.num_layers
    own = (
        settings.use_exit_norm,
        settings.untie_exit_output_weights,
        settings.use_exit_block,
        settings.use_exit_mlp,
        settings.exit_adapter_rank > 0,
    )
    require(
        has_intermediate and any(own),
        "--tune-exit: there is nothing to tune. Name intermediate exits with --exit-layer-nums, and give them parts of their own with "
        "--use-exit-block, --use-exit-mlp, --exit-adapter-rank, --use-exit-norm or --untie-exit-output-weights.",
    )
    for flag, values in (
        ("--exit-layer-weight", settings.exit_layer_weight),
        ("--exit-layer-weight-init", settings.exit_layer_weight_init),
        ("--exit-probabilities", settings.exit_probabilities),
    ):
        value = (
            by_depth(flag, values, settings.exit_layer_nums, last).get(last, 0.0) if values else 0.0
        )
        require(
            value == 0,
            f"{flag}: {value:g} for the last exit, which --tune-exit freezes, so it counts 0. "
            + ("Give it 0." if flag == "--exit-probabilities" else "Leave it out or give 0."),
        )
    rule = coefficient_rule(settings)
    for step, flag in (
        (settings.exit_layer_weight_warmup_iters, "--exit-layer-weight"),
        (0, "--exit-layer-weight-init"),
    ):
        require(
            any(step_coefficients(settings, rule, step).values()),
            f"{flag}: every intermediate exit counts 0 at step {step}, and --tune-exit trains no other. Give one a positive coefficient.",
        )
