"""Rules between precision, optimizer and schedule."""

from megatron_sorted.settings.require import require
from megatron_sorted.settings.run import Settings


def check_training(settings: Settings) -> None:
    """Returns nothing if precision, optimizer and schedule fit together.

    Raises:
        SettingsError: they do not.
    """
    require(not (settings.bf16 and settings.fp16), "--bf16, --fp16: a run has one precision. Give one of them, or none for fp32.")
    require(
        settings.fp16 or settings.loss_scale is None,
        f"--loss-scale: {settings.loss_scale} scales the loss of --fp16 only. Leave it out or give --fp16.",
    )
    require(
        settings.min_loss_scale <= settings.initial_loss_scale,
        f"--initial-loss-scale: {settings.initial_loss_scale} is below --min-loss-scale {settings.min_loss_scale}. Change one of them.",
    )
    _check_sharding(settings)
    for name, value in (("--min-lr", settings.min_lr), ("--lr-warmup-init", settings.lr_warmup_init)):
        require(value <= settings.lr, f"{name}: {value} is above --lr {settings.lr}, the peak. Change one of them.")
    decay = settings.train_iters if settings.lr_decay_iters is None else settings.lr_decay_iters
    # a run without a step (evaluation only) has no schedule to check
    require(
        settings.skip_train or settings.train_iters == 0 or settings.lr_warmup_iters < decay,
        f"--lr-warmup-iters: {settings.lr_warmup_iters} is not below the {decay} steps of the decay (--lr-decay-iters, else "
        "--train-iters). "
        "Shorten the warm-up.",
    )


def _check_sharding(settings: Settings) -> None:
    require(
        not settings.use_distributed_optimizer or settings.optimizer == "adam",
        f"--use-distributed-optimizer: megatron splits the state of adam only, not of {settings.optimizer}. Drop one of them.",
    )
    require(
        not settings.overlap_param_gather or (settings.use_distributed_optimizer and settings.overlap_grad_reduce),
        "--overlap-param-gather: needs --use-distributed-optimizer and --overlap-grad-reduce. Give both or drop it.",
    )
