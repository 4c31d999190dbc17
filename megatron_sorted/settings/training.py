"""Settings of batch, optimizer, schedule and precision, with their rules."""

from dataclasses import dataclass
from typing import Literal

from megatron_sorted.settings.field import AllSettings, setting
from megatron_sorted.settings.require import require


@dataclass(frozen=True)
class TrainingSettings:
    """Batch, optimizer, schedule, precision and layer dropout, named as in Megatron-LM."""

    micro_batch_size: int = setting(1, "Number of samples that one process computes at a time.")
    global_batch_size: int | None = setting(
        None,
        "Number of samples of one step over all processes; by default micro-batch size x data "
        "parallel size.",
    )
    train_iters: int = setting(100, "Number of optimizer steps.")
    exit_interval: int | None = setting(
        None, "Save a checkpoint and stop at the next step that is a multiple of this."
    )
    exit_duration_in_mins: float | None = setting(
        None, "Save a checkpoint and stop after this many minutes."
    )
    exit_signal_handler: bool = setting(True, "Save a checkpoint and stop on SIGTERM or SIGUSR1.")
    nonfinite_steps_allowed: int = setting(
        3,
        "Number of successive steps that may have a NaN or infinite loss or gradient; each is "
        "skipped, and one more stops the run.",
    )
    skip_train: bool = setting(False, "Do not train; only evaluate the weights of --load.")
    seed: int = setting(1234, "Seed of initial weights, data order and sampling of exits.")
    optimizer: Literal["adam", "sgd", "muon"] = setting(
        "adam",
        "Optimizer; muon needs the package emerging-optimizers.",
        untested=("dist_muon", "adaptive_muon", "soap", "lion"),
    )
    lr: float = setting(3e-4, "Peak learning rate.")
    min_lr: float = setting(0.0, "Learning rate at the end of the decay.")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = setting(
        "cosine", "Shape of the decay of the learning rate."
    )
    lr_decay_iters: int | None = setting(
        None, "Number of steps of the decay; by default --train-iters."
    )
    lr_warmup_iters: int = setting(0, "Number of steps over which the learning rate rises.")
    lr_warmup_init: float = setting(0.0, "Learning rate at step 0 of the warm-up.")
    weight_decay: float = setting(0.01, "Weight decay (not applied to norms and biases).")
    clip_grad: float = setting(1.0, "Largest global gradient norm; 0: no clipping.")
    adam_beta1: float = setting(0.9, "Adam's decay of the first moment.")
    adam_beta2: float = setting(0.999, "Adam's decay of the second moment.")
    adam_eps: float = setting(1e-8, "Epsilon of Adam.")
    sgd_momentum: float = setting(0.9, "Momentum of SGD.")
    bf16: bool = setting(False, "Train in bfloat16 with fp32 main weights and gradients.")
    fp16: bool = setting(
        False, "Train in float16 with fp32 main weights and gradients and loss scaling."
    )
    loss_scale: float | None = setting(None, "Fixed fp16 loss scale; by default it adapts.")
    initial_loss_scale: float = setting(2.0**32, "First value of the adapting loss scale.")
    min_loss_scale: float = setting(1.0, "Smallest value of the adapting loss scale.")
    loss_scale_window: int = setting(
        1000, "Number of successive finite steps after which the loss scale doubles."
    )
    hysteresis: int = setting(2, "Number of overflowing steps after which the loss scale halves.")
    calculate_per_token_loss: bool = setting(
        True,
        "Average the loss over all trained tokens of the global batch, whatever the layout; "
        "--no-calculate-per-token-loss averages the means of the micro-batches.",
    )
    layer_dropout: float = setting(
        0.0,
        "Probability of dropping the last layer for a sample; it grows exponentially from 0 at "
        "the first layer (LayerSkip: 0.1 to 0.2).",
    )
    layer_dropout_schedule: Literal["constant", "exponential"] = setting(
        "constant",
        "That probability over the steps: constant (continued training, fine-tuning), or growing "
        "exponentially from 0 (from scratch).",
    )


def check_training(settings: AllSettings) -> None:
    """Check that precision, optimizer, schedule and layer dropout fit together.

    Raises:
        SettingsError: They do not.
    """
    require(
        not (settings.bf16 and settings.fp16),
        "--bf16, --fp16: a run has one precision. Give one of them, or none for fp32.",
    )
    require(
        settings.fp16 or settings.loss_scale is None,
        f"--loss-scale: {settings.loss_scale} has an effect with --fp16 only. Leave it out or "
        "give --fp16.",
    )
    require(
        settings.min_loss_scale <= settings.initial_loss_scale,
        f"--initial-loss-scale: {settings.initial_loss_scale} is below --min-loss-scale "
        f"{settings.min_loss_scale}. Change one of them.",
    )
    _check_sharding(settings)
    _check_layer_dropout(settings)
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
        f"--lr-warmup-iters: {settings.lr_warmup_iters} is not below the {decay} steps of the "
        "decay (--lr-decay-iters, else --train-iters). Shorten the warm-up.",
    )


def _check_sharding(settings: AllSettings) -> None:
    require(
        not settings.use_distributed_optimizer or settings.optimizer == "adam",
        "--use-distributed-optimizer: megatron splits the state of adam only, not of "
        f"{settings.optimizer}. Use adam, or leave it out.",
    )
    require(
        not settings.overlap_param_gather
        or (settings.use_distributed_optimizer and settings.overlap_grad_reduce),
        "--overlap-param-gather: needs --use-distributed-optimizer and --overlap-grad-reduce. "
        "Give both or leave it out.",
    )


def _check_layer_dropout(settings: AllSettings) -> None:
    """Check that a dropped layer is the same layer in forward and backward."""
    chance, schedule = settings.layer_dropout, settings.layer_dropout_schedule
    require(
        schedule == "constant" or chance > 0,
        f"--layer-dropout-schedule: {schedule} has no effect without --layer-dropout. Give that "
        "as well, or leave it out.",
    )
    require(
        chance == 0 or settings.recompute_granularity != "full",
        f"--layer-dropout: {chance} with --recompute-granularity full, which runs layers a second "
        "time in backward, when the draw of their micro-batch is no longer known. Use selective "
        "or none.",
    )
    require(
        chance == 0 or settings.num_layers > 1,
        f"--layer-dropout: {chance} in a network of one layer, which is the first layer and is "
        "never dropped. Leave it out.",
    )
