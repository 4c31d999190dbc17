"""What exits learn from a teacher, and what is done where gradients of exits meet."""

from dataclasses import dataclass
from typing import Literal

from megatron_sorted.settings.field import AllSettings, setting
from megatron_sorted.settings.require import require
from megatron_sorted.settings.weighting import trainable_exits


@dataclass(frozen=True)
class ExitDistillationSettings:
    """Rules for gradients at intermediate exits, and self-distillation from the last exit."""

    exit_gradient_rule: Literal["sum", "equilibrium", "balance", "project"] = setting(
        "sum",
        "How an intermediate exit's gradient joins that of all deeper exits in the layers below: added as it is (sum); both scaled "
        "so that the layers see the mean over the exits above them (equilibrium, IMTA); its norm set to --exit-gradient-balance times "
        "the deeper one's (balance); without the part that opposes the deeper one (project). The exit's own norm and head are not touched.",
    )
    exit_gradient_scope: Literal["token", "micro-batch"] = setting(
        "token",
        "Over what norms and products of balance and project are taken: each token by itself, or the whole micro-batch.",
    )
    exit_gradient_balance: float = setting(
        1.0,
        "Norm of an exit's gradient over that of the deeper exits' gradient, for --exit-gradient-rule balance.",
    )
    log_exit_gradients: bool = setting(
        False,
        "Measure cosine and ratio of norms of each exit's gradient and the deeper exits' at every step, not at reports only.",
    )
    exit_kd_weight: float = setting(
        0.0,
        "Share L in [0, 1] of distillation in the loss of every intermediate exit: (1 - L) cross entropy + L T^2 KL(last exit || "
        "exit), the last exit being the teacher. 0: none.",
    )
    exit_kd_temperature: float = setting(
        1.0, "Temperature T of the distillation: both distributions are softmax(logits / T)."
    )
    exit_kd_teacher: str | None = setting(
        None,
        "Directory of a model that teaches every exit, the last included, instead of the last exit: Hugging Face's or checkpoints, "
        "of the same width and vocabulary, often the one that --load starts from. It is frozen, in the layout of the run.",
    )
    exit_kd_top_k: int | None = setting(
        None,
        "The teacher's distribution is cut to its so many most likely tokens and scaled to sum 1; by default whole.",
    )


def check_exit_distillation(settings: AllSettings) -> None:
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


def _check_gradient_rule(settings: AllSettings, training: list[int]) -> None:
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


def _check_distillation_numbers(settings: AllSettings) -> None:
    weight, top_k = settings.exit_kd_weight, settings.exit_kd_top_k
    require(
        0 <= weight <= 1,
        f"--exit-kd-weight: {weight:g} is not in [0, 1]. Give the share of distillation in an exit's loss.",
    )
    require(
        weight > 0
        or (
            settings.exit_kd_temperature == 1.0
            and top_k is None
            and settings.exit_kd_teacher is None
        ),
        "--exit-kd-temperature, --exit-kd-top-k, --exit-kd-teacher: they have no effect without distillation. Leave them out, or give "
        "--exit-kd-weight.",
    )
    check_top_k(settings)


def check_top_k(settings: AllSettings) -> None:
    """Returns nothing if the teacher has as many tokens as it is cut to; nothing is known where the vocabulary is not yet.

    Raises:
        SettingsError: it has not.
    """
    top_k, vocabulary = settings.exit_kd_top_k, settings.vocab_size
    require(
        top_k is None or vocabulary is None or top_k <= vocabulary,
        f"--exit-kd-top-k: {top_k} is more than the vocabulary's {vocabulary} tokens. Give at most that, or leave it out for all.",
    )
