"""Settings of the parts an intermediate exit may own beside norm and head, with their rules."""

from dataclasses import dataclass

from megatron_sorted.exits.depths import by_depth
from megatron_sorted.settings.coefficient_rule import coefficient_rule
from megatron_sorted.settings.derived import exit_depths, step_coefficients
from megatron_sorted.settings.field import AllSettings, setting
from megatron_sorted.settings.lora import is_adapter
from megatron_sorted.settings.require import require

PARTS = ("exit_adapters", "exit_blocks", "exit_mlps")
"""Names of the parts within a model chunk, in the order in which a hidden state passes them."""

OWN_OF_EXITS = tuple(f"{name}." for name in (*PARTS, "exit_norms", "exit_output_layers"))
"""Prefixes of the names of parameters that belong to a single exit, in chunks and checkpoints."""


@dataclass(frozen=True)
class ExitPartSettings:
    """Parts between the hidden state and the norm of an intermediate exit, named as in EE-LLM.

    The last exit never has any.
    """

    use_exit_block: bool = setting(
        False,
        "Give every intermediate exit a transformer layer of its own before its norm (Balcony); "
        "it starts as a copy of the last layer.",
    )
    use_exit_mlp: bool = setting(
        False,
        "Give every intermediate exit an MLP with a norm of its own before its norm (EE-Tuning); "
        "it starts as a copy of the last layer's.",
    )
    exit_adapter_rank: int = setting(
        0,
        "Rank of a low-rank adapter that every intermediate exit adds to its hidden state before "
        "its norm; it starts at zero. 0: no adapter.",
    )
    tune_exit: bool = setting(
        False,
        "Train only what the intermediate exits own; everything else is frozen and stays bit for "
        "bit the same.",
    )


def check_exit_parts(settings: AllSettings) -> None:
    """Check that exits can have these parts, and that something trains.

    Raises:
        SettingsError: They cannot, or nothing trains.
    """
    has_intermediate = len(exit_depths(settings)) > 1
    for flag, given in (
        ("--use-exit-block", settings.use_exit_block),
        ("--use-exit-mlp", settings.use_exit_mlp),
        ("--exit-adapter-rank", settings.exit_adapter_rank),
    ):
        require(
            not given or has_intermediate,
            f"{flag}: there is no intermediate exit to have it, and the last exit never has one. "
            "Name some with --exit-layer-nums.",
        )
    require(
        not (settings.use_exit_block and settings.use_exit_mlp),
        "--use-exit-block, --use-exit-mlp: a block has an MLP of its own. Give one of them.",
    )
    require(
        settings.exit_adapter_rank <= settings.hidden_size,
        f"--exit-adapter-rank: {settings.exit_adapter_rank} is above --hidden-size "
        f"{settings.hidden_size}, so the adapter would not be low-rank. Lower it.",
    )
    require(
        settings.num_experts is None or not (settings.use_exit_block or settings.use_exit_mlp),
        "--use-exit-block, --use-exit-mlp: not supported with experts (--num-experts "
        f"{settings.num_experts}): the router's losses belong to layers of the network. Use "
        "--exit-adapter-rank, or own norms and heads.",
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
        "--tune-exit: there is nothing to tune. Name intermediate exits with --exit-layer-nums, "
        "and give them parts of their own with --use-exit-block, --use-exit-mlp, "
        "--exit-adapter-rank, --use-exit-norm or --untie-exit-output-weights.",
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
            (
                f"{flag}: {value:g} for the last exit, which --tune-exit freezes, so its loss must "
                "count 0. "
            )
            + ("Give it 0." if flag == "--exit-probabilities" else "Leave it out or give 0."),
        )
    rule = coefficient_rule(settings)
    for step, flag in (
        (settings.exit_layer_weight_warmup_iters, "--exit-layer-weight"),
        (0, "--exit-layer-weight-init"),
    ):
        require(
            any(step_coefficients(settings, rule, step).values()),
            f"{flag}: every intermediate exit counts 0 at step {step}, and --tune-exit trains no "
            "other. Give one a positive coefficient.",
        )


def is_trained(name: str, settings: AllSettings) -> bool:
    """Return whether the parameter of this name, within a chunk or in a checkpoint, trains."""
    is_base_frozen = settings.tune_exit or settings.lora_rank > 0
    return not is_base_frozen or is_adapter(name) or name.startswith(OWN_OF_EXITS)
