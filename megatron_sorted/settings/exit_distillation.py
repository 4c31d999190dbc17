"""Settings of distillation, and of how gradients of exits are joined, with their rules."""

from dataclasses import dataclass
from typing import Literal

from megatron_sorted.settings.coefficient_rule import trainable_exits
from megatron_sorted.settings.field import AllSettings, setting
from megatron_sorted.settings.require import require


@dataclass(frozen=True)
class ExitDistillationSettings:
    """Rules for gradients at intermediate exits, and distillation from a teacher."""

    exit_gradient_rule: Literal["sum", "equilibrium", "balance", "project"] = setting(
        "sum",
        "How the gradient of an intermediate exit is joined with that of all deeper exits for the "
        "layers below: sum adds both; equilibrium scales both so that the layers see the mean "
        "over the exits above them (IMTA); balance sets its norm to --exit-gradient-balance times "
        "the deeper one's; project removes the component that opposes the deeper one. The exit's "
        "own norm and head keep their gradient.",
    )
    exit_gradient_scope: Literal["token", "micro-batch"] = setting(
        "token",
        "Over what balance and project compute norms and products: each token by itself, or the "
        "whole micro-batch.",
    )
    exit_gradient_balance: float = setting(
        1.0,
        "For --exit-gradient-rule balance: norm of an exit's gradient divided by that of the "
        "deeper exits' gradient.",
    )
    log_exit_gradients: bool = setting(
        False,
        "Measure cosine and norm ratio of each exit's gradient and the deeper exits' at every "
        "step, not only at reports.",
    )
    exit_kd_weight: float = setting(
        0.0,
        "Share L in [0, 1] of distillation in the loss of every exit that has a teacher: (1 - L) "
        "cross entropy + L T^2 KL(teacher || exit). The last exit teaches the others, unless "
        "--exit-kd-teacher names a model. 0: no distillation.",
    )
    exit_kd_target: Literal["distribution", "choice"] = setting(
        "distribution",
        "What an exit learns of its teacher: distribution, all probabilities; choice, the most "
        "likely token alone, as a label: (1 - L) cross entropy + L cross entropy on the teacher's "
        "choice. choice suits exits that draft for greedy decoding.",
    )
    exit_kd_temperature: float = setting(
        1.0, "Temperature T of the distillation: both distributions are softmax(logits / T)."
    )
    exit_kd_teacher: str | None = setting(
        None,
        "Directory of a frozen model that teaches every exit, the last included, instead of the "
        "last exit: a Hugging Face directory or checkpoints, with the same width and vocabulary; "
        "often the model that --load starts from. It is split over devices as the run is.",
    )
    exit_kd_top_k: int | None = setting(
        None,
        "Number of the teacher's most likely tokens that its distribution is cut to, scaled to "
        "sum 1; by default all tokens.",
    )


def check_exit_distillation(settings: AllSettings) -> None:
    """Check that gradient rule and distillation can act; raise `SettingsError` if not."""
    training = trainable_exits(settings)
    shallower = [depth for depth in training if depth != settings.num_layers]
    _check_gradient_rule(settings, training)
    _check_distillation_numbers(settings)
    if settings.exit_kd_weight == 0:
        return
    if settings.exit_kd_teacher is not None:
        return  # a separate model teaches every exit that trains
    require(
        bool(shallower),
        f"--exit-kd-weight: {settings.exit_kd_weight:g}, but no intermediate exit trains, so none "
        "learns from the last one. Name exits with --exit-layer-nums and give them a coefficient "
        "above 0, or leave it out.",
    )
    # a base that is frozen as a whole is a fixed teacher; layers that train for other exits would
    # change a last exit that does not train itself
    require(
        settings.num_layers in training or settings.tune_exit,
        f"--exit-kd-weight: {settings.exit_kd_weight:g}, but the teacher, the last exit (depth "
        f"{settings.num_layers}), does not train (coefficient or probability 0) while the layers "
        "below it do. Let it train, or freeze all but the exits (--tune-exit).",
    )


def _check_gradient_rule(settings: AllSettings, training: list[int]) -> None:
    rule = settings.exit_gradient_rule
    require(
        rule == "sum" or len(training) > 1,
        f"--exit-gradient-rule: {rule}, but fewer than two exits train, so there are no two "
        "gradients to join. Name exits with --exit-layer-nums and give them a coefficient above "
        "0, or leave it out.",
    )
    require(
        settings.exit_gradient_scope == "token" or rule in ("balance", "project"),
        f"--exit-gradient-scope: {settings.exit_gradient_scope} has no effect on "
        f"--exit-gradient-rule {rule}, which computes no norms. Leave it out, or use balance or "
        "project.",
    )
    require(
        settings.exit_gradient_balance == 1.0 or rule == "balance",
        f"--exit-gradient-balance: {settings.exit_gradient_balance:g} has no effect on "
        f"--exit-gradient-rule {rule}. Leave it out, or use balance.",
    )


def _check_distillation_numbers(settings: AllSettings) -> None:
    weight, top_k, target = settings.exit_kd_weight, settings.exit_kd_top_k, settings.exit_kd_target
    require(
        0 <= weight <= 1,
        f"--exit-kd-weight: {weight:g} is not in [0, 1]. Give the share of distillation in an "
        "exit's loss.",
    )
    require(
        weight > 0
        or (
            settings.exit_kd_temperature == 1.0
            and top_k is None
            and settings.exit_kd_teacher is None
            and target == "distribution"
        ),
        "--exit-kd-target, --exit-kd-temperature, --exit-kd-top-k, --exit-kd-teacher: these have "
        "no effect without distillation. Leave them out, or give --exit-kd-weight.",
    )
    for flag, value, default in (
        ("--exit-kd-temperature", settings.exit_kd_temperature, 1.0),
        ("--exit-kd-top-k", top_k, None),
    ):
        require(
            target == "distribution" or value == default,
            f"{flag}: {value} has no effect on --exit-kd-target choice, which uses the teacher's "
            "most likely token alone. Leave it out, or use --exit-kd-target distribution.",
        )
    check_top_k(settings)


def check_top_k(settings: AllSettings) -> None:
    """Check that the teacher has as many tokens as it is cut to; raise `SettingsError` if not.

    The vocabulary may be known only later; the check is then repeated.
    """
    top_k, vocabulary = settings.exit_kd_top_k, settings.vocab_size
    require(
        top_k is None or vocabulary is None or top_k <= vocabulary,
        f"--exit-kd-top-k: {top_k} is more than the vocabulary's {vocabulary} tokens. Give at "
        "most that, or leave it out for all.",
    )
