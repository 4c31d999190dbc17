"""Settings of low-rank adapters on the layers' matrices, their rules and what follows from them."""

import dataclasses
from dataclasses import dataclass

from megatron_sorted.exits.chance import draw_rank
from megatron_sorted.settings.field import AllSettings, flag_of, setting
from megatron_sorted.settings.matrices import layer_shapes
from megatron_sorted.settings.require import nearest, require

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
MUST_AGREE = ("lora_rank", "lora_alpha", "lora_targets")
"""Settings that define the adapters of a checkpoint; how they train may change."""


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (LoRA, DyLoRA) on a frozen network."""

    lora_rank: int = setting(
        0,
        "Rank of the trained product B A that is added to each target matrix; everything else but "
        "the exits' own parts is frozen. 0: no adapters.",
    )
    lora_alpha: float = setting(
        32.0, "Scale of an adapter: its product is multiplied by --lora-alpha / rank."
    )
    lora_targets: tuple[str, ...] = setting(TARGETS, "Matrices of every layer that get an adapter.")
    lora_dropout: float = setting(0.0, "Dropout on the input of an adapter.")
    dylora: bool = setting(
        False,
        "Train nested ranks (DyLoRA): each step draws a rank b and uses the first b ranks, so "
        "that the adapter can be cut to any of them.",
    )
    dylora_frozen: bool = setting(
        False,
        "With --dylora: train only rank b at a step; the ranks below it are used as they are.",
    )
    dylora_ranks: tuple[int, ...] = setting(
        (),
        "With --dylora: ranks to draw from; --lora-rank must be one of them. By default 1, 2, "
        "..., --lora-rank.",
    )


def check_adapters(settings: AllSettings) -> None:
    """Check that the adapters fit this network and can train; raise `SettingsError` if not."""
    if not settings.lora_rank:
        for field in dataclasses.fields(LoraSettings):
            value = getattr(settings, field.name)
            require(
                value == field.default,
                f"{flag_of(field.name)}: there are no adapters (--lora-rank 0). Give a rank or "
                "leave it out.",
            )
        return
    _check_network(settings)
    _check_targets(settings)
    _check_nested(settings)


def _check_network(settings: AllSettings) -> None:
    require(
        not settings.tune_exit,
        f"--lora-rank: {settings.lora_rank} with --tune-exit, which keeps the outputs of the last "
        "exit unchanged. Adapters change them, and train together with the exits' own parts "
        "anyway. Give one of them.",
    )
    require(
        settings.transformer_impl != "transformer_engine",
        f"--lora-rank: {settings.lora_rank} with --transformer-impl transformer_engine, whose "
        "layers fuse the norm into the matrix, so an adapter cannot read what the matrix reads. "
        "Use --transformer-impl local (auto then chooses it).",
    )
    require(
        settings.context_parallel_size == 1,
        f"--lora-rank: {settings.lora_rank} with --context-parallel-size "
        f"{settings.context_parallel_size}, which needs the layers of Transformer Engine; "
        "adapters need the local ones. Use --context-parallel-size 1.",
    )
    require(
        settings.num_experts is None,
        f"--lora-rank: {settings.lora_rank} with --num-experts {settings.num_experts}: experts "
        "need the layers of Transformer Engine; adapters need the local ones. Leave one of them "
        "out.",
    )


def _check_targets(settings: AllSettings) -> None:
    require(
        bool(settings.lora_targets),
        f"--lora-targets: empty with --lora-rank {settings.lora_rank}. Name some of "
        f"{', '.join(TARGETS)}.",
    )
    for target in settings.lora_targets:
        hint = nearest(target, TARGETS, f"Use some of {', '.join(TARGETS)}.")
        require(target in TARGETS, f"--lora-targets: {target!r} is no matrix of a layer. {hint}")
        require(
            settings.lora_targets.count(target) == 1,
            f"--lora-targets: {target} is named twice. Name it once.",
        )
        rows, columns = layer_shapes(settings).matrices[target]
        require(
            settings.lora_rank <= min(rows, columns),
            f"--lora-rank: {settings.lora_rank} is more than the smaller side of {target} ({rows} "
            f"x {columns}), which needs no more to become any matrix. Give at most "
            f"{min(rows, columns)}, or take {target} out of --lora-targets.",
        )


def _check_nested(settings: AllSettings) -> None:
    if not settings.dylora:
        for name in ("dylora_frozen", "dylora_ranks"):
            require(
                not getattr(settings, name),
                f"{flag_of(name)}: ranks are nested with --dylora only. Give it or leave this out.",
            )
        return
    ranks = settings.dylora_ranks
    for rank in ranks:
        require(
            1 <= rank <= settings.lora_rank,
            f"--dylora-ranks: {rank} is not in 1..{settings.lora_rank} (--lora-rank). Change one.",
        )
        require(
            ranks.count(rank) == 1,
            f"--dylora-ranks: {rank} is listed twice. Each is drawn with the same probability; "
            "list it once.",
        )
    require(
        not ranks or max(ranks) == settings.lora_rank,
        f"--dylora-ranks: {' '.join(map(str, ranks))}: the ranks above {max(ranks, default=0)} of "
        f"--lora-rank {settings.lora_rank} would never train. Lower --lora-rank or add it to the "
        "list.",
    )


def is_adapter(name: str) -> bool:
    """Return whether a parameter of this name is half of an adapter.

    >>> is_adapter("decoder.layers.0.mlp.linear_fc1.lora_a")
    True
    """
    return name.endswith((".lora_a", ".lora_b"))


def adapter_parameters(settings: AllSettings) -> int:
    """Return the number of parameters of all adapters."""
    shapes = layer_shapes(settings).matrices
    sides = sum(sum(shapes[target]) for target in settings.lora_targets)
    return settings.num_layers * settings.lora_rank * sides


def nested_ranks(settings: AllSettings) -> tuple[int, ...]:
    """Return the ranks that the adapters can be used at: with DyLoRA those it draws."""
    if not settings.dylora:
        return (settings.lora_rank,)
    return tuple(sorted(settings.dylora_ranks)) or tuple(range(1, settings.lora_rank + 1))


def rank_at(settings: AllSettings, step: int) -> int:
    """Return how many ranks of every adapter are used at ``step``.

    Every process draws the same one without communication.
    """
    return draw_rank(step, settings.seed, nested_ranks(settings))
