"""Low-rank adapters on the layers' matrices: train those and freeze the network they adapt."""

import dataclasses
from dataclasses import dataclass

from megatron_sorted.settings.field import AllSettings, flag_of, setting
from megatron_sorted.settings.lora import TARGETS
from megatron_sorted.settings.matrices import layer_shapes
from megatron_sorted.settings.require import nearest, require


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (LoRA, DyLoRA) on a frozen network."""

    lora_rank: int = setting(
        0,
        "Rank of a trained product B A added to each target's matrix, all else but the exits' own parts being frozen; 0: none.",
    )
    lora_alpha: float = setting(32.0, "The product counts --lora-alpha / rank.")
    lora_targets: tuple[str, ...] = setting(
        ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
        "Matrices of every layer that get an adapter.",
    )
    lora_dropout: float = setting(0.0, "Dropout on what an adapter reads.")
    dylora: bool = setting(
        False,
        "Nested ranks (DyLoRA): each step draws a rank b and uses the first b ranks, so that the adapter can be cut to any of them.",
    )
    dylora_frozen: bool = setting(
        False, "With --dylora: only rank b trains at a step, those below it are used as they are."
    )
    dylora_ranks: tuple[int, ...] = setting(
        (), "With --dylora: ranks to draw from, --lora-rank among them; by default 1, 2, ..., rank."
    )


def check_adapters(settings: AllSettings) -> None:
    """Returns nothing if the adapters that are asked for can be put on this network and trained.

    Raises:
        SettingsError: they cannot.
    """
    if not settings.lora_rank:
        for field in dataclasses.fields(LoraSettings):
            value = getattr(settings, field.name)
            require(
                value == field.default,
                f"{flag_of(field.name)}: there are no adapters (--lora-rank 0). Give a rank or leave it out.",
            )
        return
    _check_network(settings)
    _check_targets(settings)
    _check_nested(settings)


def _check_network(settings: AllSettings) -> None:
    require(
        not settings.tune_exit,
        f"--lora-rank: {settings.lora_rank} with --tune-exit, which keeps what the last exit says. Adapters change it, and train together "
        "with the parts exits own as it is. Give one of them.",
    )
    require(
        settings.transformer_impl != "transformer_engine",
        f"--lora-rank: {settings.lora_rank} with --transformer-impl transformer_engine, whose layers fuse the norm into the matrix, so an "
        "adapter cannot read what the matrix reads. Use --transformer-impl local (auto takes it).",
    )
    require(
        settings.context_parallel_size == 1,
        f"--lora-rank: {settings.lora_rank} with --context-parallel-size {settings.context_parallel_size}, which needs the layers of "
        "Transformer Engine; adapters are on the local ones. Use --context-parallel-size 1.",
    )
    require(
        settings.num_experts is None,
        f"--lora-rank: {settings.lora_rank} with --num-experts {settings.num_experts}: experts need the layers of Transformer Engine; "
        "adapters are on the local ones. Leave one of them out.",
    )


def _check_targets(settings: AllSettings) -> None:
    require(
        bool(settings.lora_targets),
        f"--lora-targets: empty with --lora-rank {settings.lora_rank}. Name some of {', '.join(TARGETS)}.",
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
            f"--lora-rank: {settings.lora_rank} is more than the smaller side of {target} ({rows} x {columns}), which needs no more to "
            f"become any matrix. Give at most {min(rows, columns)}, or take {target} out of --lora-targets.",
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
            f"--dylora-ranks: {rank} stands twice. Each is drawn with the same probability; name it once.",
        )
    require(
        not ranks or max(ranks) == settings.lora_rank,
        f"--dylora-ranks: {' '.join(map(str, ranks))}: the ranks above {max(ranks, default=0)} of --lora-rank {settings.lora_rank} would "
        "never train. Lower --lora-rank or add it to the list.",
    )
