"""How long, how fast and in which precision a run trains."""

from dataclasses import dataclass
from typing import Literal

from megatron_sorted.settings.field import AllSettings, setting
from megatron_sorted.settings.require import require


@dataclass(frozen=True)
class TrainingSettings:
    """Batch, optimizer, schedule and precision, in Megatron-LM's words."""

    micro_batch_size: int = setting(1, "Samples one process computes at a time.")
    global_batch_size: int | None = setting(
        None, "Samples of one step over all processes; by default micro batch x data parallel size."
    )
    train_iters: int = setting(100, "Number of optimizer steps.")
    exit_interval: int | None = setting(
        None, "Save and stop at every step that is a multiple of this."
    )
    exit_duration_in_mins: float | None = setting(
        None, "Save and stop once the run has lasted this many minutes."
    )
    exit_signal_handler: bool = setting(True, "Save and stop at SIGTERM and SIGUSR1.")
    nonfinite_steps_allowed: int = setting(
        3,
        "Steps in a row with a loss or gradient that is NaN or infinite: each is skipped, one more stops the run.",
    )
    skip_train: bool = setting(False, "Do not train; only evaluate what --load brings.")
    seed: int = setting(1234, "Seed of weights, data order and sampling of exits.")
    optimizer: Literal["adam", "sgd"] = setting("adam", "Optimizer.")
    lr: float = setting(3e-4, "Peak learning rate.")
    min_lr: float = setting(0.0, "Learning rate at the end of the decay.")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = setting(
        "cosine", "Shape of the decay."
    )
    lr_decay_iters: int | None = setting(None, "Steps of the decay; by default --train-iters.")
    lr_warmup_iters: int = setting(0, "Steps over which the learning rate rises.")
    lr_warmup_init: float = setting(0.0, "Learning rate at step 0 of the warm-up.")
    weight_decay: float = setting(0.01, "Weight decay (not applied to norms and biases).")
    clip_grad: float = setting(1.0, "Largest global gradient norm; 0: no clipping.")
    adam_beta1: float = setting(0.9, "First Adam coefficient.")
    adam_beta2: float = setting(0.999, "Second Adam coefficient.")
    adam_eps: float = setting(1e-8, "Epsilon of Adam.")
    sgd_momentum: float = setting(0.9, "Momentum of SGD.")
    bf16: bool = setting(False, "Train in bfloat16 with fp32 main weights and gradients.")
    fp16: bool = setting(
        False, "Train in float16 with fp32 main weights and gradients and loss scaling."
    )
    loss_scale: float | None = setting(None, "Fixed fp16 loss scale; by default it adapts.")
    initial_loss_scale: float = setting(2.0**32, "First value of the adapting loss scale.")
    min_loss_scale: float = setting(1.0, "Smallest value of the adapting loss scale.")
    loss_scale_window: int = setting(1000, "Good steps after which the loss scale doubles.")
    hysteresis: int = setting(2, "Bad steps after which the loss scale halves.")
    calculate_per_token_loss: bool = setting(
        True,
        "Loss is the mean over all trained tokens of the global batch, whatever the layout; --no-calculate-per-token-loss averages the "
        "micro-batches' means.",
    )


def check_training(settings: AllSettings) -> None:
    """Returns nothing if precision, optimizer and schedule fit together.

    Raises:
        SettingsError: they do not.
    """
    require(
        not (settings.bf16 and settings.fp16),
        "--bf16, --fp16: a run has one precision. Give one of them, or none for fp32.",
    )
    require(
        settings.fp16 or settings.loss_scale is None,
        f"--loss-scale: {settings.loss_scale} scales the loss of --fp16 only. Leave it out or give --fp16.",
    )
    require(
        settings.min_loss_scale <= settings.initial_loss_scale,
        f"--initial-loss-scale: {settings.initial_loss_scale} is below --min-loss-scale {settings.min_loss_scale}. Change one of them.",
    )
    _check_sharding(settings)
    for name, value in (
        ("--min-lr", settings.min_lr),
        ("--lr-warmup-init", settings.lr_warmup_init),
    ):
        require(
            value <= settings.lr,
            f"{name}: {value} is above --lr {settings.lr}, the peak. Change one of them.",
        )
    decay = settings.train_iters if settings.lr_decay_iters is None else settings.lr_decay_iters
    # a run without a step (evaluation only) has no schedule to check
    require(
        settings.skip_train or settings.train_iters == 0 or settings.lr_warmup_iters < decay,
        f"--lr-warmup-iters: {settings.lr_warmup_iters} is not below the {decay} steps of the decay (--lr-decay-iters, else "
        "--train-iters). "
        "Shorten the warm-up.",
    )


def _check_sharding(settings: AllSettings) -> None:
    require(
        not settings.use_distributed_optimizer or settings.optimizer == "adam",
        f"--use-distributed-optimizer: megatron splits the state of adam only, not of {settings.optimizer}. Drop one of them.",
    )
    require(
        not settings.overlap_param_gather
        or (settings.use_distributed_optimizer and settings.overlap_grad_reduce),
        "--overlap-param-gather: needs --use-distributed-optimizer and --overlap-grad-reduce. Give both or drop it.",
    )
