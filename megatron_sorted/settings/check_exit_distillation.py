"""Rules for gradients at exits and for self-distillation."""

from megatron_sorted.settings.require import require
from megatron_sorted.settings.run import Settings
from megatron_sorted.settings.weighting import trainable_exits


def check_exit_distillation(settings: Settings) -> None:
    """Returns nothing if what is asked of exits and their gradients can be done and has an effect.

    Raises:
        SettingsError: it does not.
    """
    training = trainable_exits(settings)
    shallower = [depth for depth in training if depth != settings.num_layers]
    _check_gradient_rule(settings, training)
    _check_distillation_numbers(settings)
    if settings.exit_kd_weight == 0:
        return
    if settings.exit_kd_teacher is not None:
        return  # a model of its own teaches whoever trains
    require(
        bool(shallower),
        f"--exit-kd-weight: {settings.exit_kd_weight:g}, but no intermediate exit trains, so nobody learns from the last one. "
        "Name exits with --exit-layer-nums and give them a coefficient above 0, or leave it out.",
    )
    # a base that is frozen as a whole is a teacher as it is; one that trains for others' sake only would be spoilt by them
    require(
        settings.num_layers in training or settings.tune_exit,
        f"--exit-kd-weight: {settings.exit_kd_weight:g}, but the teacher, the last exit (depth {settings.num_layers}), does not train "
        "(coefficient or probability 0) while the layers below it do. Let it train, or freeze all but the exits (--tune-exit).",
    )


def _check_gradient_rule(settings: Settings, training: list[int]) -> None:
    rule = settings.exit_gradient_rule
    require(
        rule == "sum" or len(training) > 1,
        f"--exit-gradient-rule: {rule}, but fewer than two exits train, so no two gradients meet. Name exits with --exit-layer-nums and "
        "give them a coefficient above 0, or leave it out.",
    )
    require(
        settings.exit_gradient_scope == "token" or rule in ("balance", "project"),
        f"--exit-gradient-scope: {settings.exit_gradient_scope} has no effect on --exit-gradient-rule {rule}, which takes no norms. "
        "Leave it out, or use balance or project.",
    )
    require(
        settings.exit_gradient_balance == 1.0 or rule == "balance",
        f"--exit-gradient-balance: {settings.exit_gradient_balance:g} has no effect on --exit-gradient-rule {rule}. Leave it out, or use "
        "balance.",
    )


def _check_distillation_numbers(settings: Settings) -> None:
    weight, top_k = settings.exit_kd_weight, settings.exit_kd_top_k
    require(0 <= weight <= 1, f"--exit-kd-weight: {weight:g} is not in [0, 1]. Give the share of distillation in an exit's loss.")
    require(
        weight > 0 or (settings.exit_kd_temperature == 1.0 and top_k is None and settings.exit_kd_teacher is None),
        "--exit-kd-temperature, --exit-kd-top-k, --exit-kd-teacher: they have no effect without distillation. Leave them out, or give "
        "--exit-kd-weight.",
    )
    check_top_k(settings)


def check_top_k(settings: Settings) -> None:
    """Returns nothing if the teacher has as many tokens as it is cut to; nothing is known where the vocabulary is not yet.

    Raises:
        SettingsError: it has not.
    """
    top_k, vocabulary = settings.exit_kd_top_k, settings.vocab_size
    require(
        top_k is None or vocabulary is None or top_k <= vocabulary,
        f"--exit-kd-top-k: {top_k} is more than the vocabulary's {vocabulary} tokens. Give at most that, or leave it out for all.",
    )
