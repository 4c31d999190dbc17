"""What becomes of an exit's gradient where it meets the deeper ones', and what an exit learns from the last one."""

from dataclasses import dataclass
from typing import Literal

from megatron_sorted.settings.field import setting


@dataclass(frozen=True)
class ExitDistillationSettings:
    """Rules for gradients at intermediate exits, and self-distillation from the last exit."""

    exit_gradient_rule: Literal["sum", "equilibrium", "balance", "project"] = setting(
        "sum", "How an intermediate exit's gradient joins that of all deeper exits in the layers below: added as it is (sum); both scaled "
        "so that the layers see the mean over the exits above them (equilibrium, IMTA); its norm set to --exit-gradient-balance times "
        "the deeper one's (balance); without the part that opposes the deeper one (project). The exit's own norm and head are not touched.")
    exit_gradient_scope: Literal["token", "micro-batch"] = setting(
        "token", "Over what norms and products of balance and project are taken: each token by itself, or the whole micro-batch.")
    exit_gradient_balance: float = setting(
        1.0, "Norm of an exit's gradient over that of the deeper exits' gradient, for --exit-gradient-rule balance.")
    log_exit_gradients: bool = setting(
        False, "Measure cosine and ratio of norms of each exit's gradient and the deeper exits' at every step, not at reports only.")
    exit_kd_weight: float = setting(
        0.0, "Share L in [0, 1] of distillation in the loss of every intermediate exit: (1 - L) cross entropy + L T^2 KL(last exit || "
        "exit), the last exit being the teacher. 0: none.")
    exit_kd_temperature: float = setting(1.0, "Temperature T of the distillation: both distributions are softmax(logits / T).")
    exit_kd_teacher: str | None = setting(
        None, "Directory of a model that teaches every exit, the last included, instead of the last exit: Hugging Face's or checkpoints, "
        "of the same width and vocabulary, often the one that --load starts from. It is frozen, in the layout of the run.")
    exit_kd_top_k: int | None = setting(
        None, "The teacher's distribution is cut to its so many most likely tokens and scaled to sum 1; by default whole.")
