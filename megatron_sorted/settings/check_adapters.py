"""Rules of low-rank adapters."""

import dataclasses

from megatron_sorted.settings.adapters import LoraSettings
from megatron_sorted.settings.flags import flag_of
from megatron_sorted.settings.lora import TARGETS, target_shapes
from megatron_sorted.settings.nearest import nearest
from megatron_sorted.settings.require import require
from megatron_sorted.settings.run import Settings


def check_adapters(settings: Settings) -> None:
    """Returns nothing if the adapters that are asked for can be put on this network and trained.

    Raises:
        SettingsError: they cannot.
    """
    if not settings.lora_rank:
        for field in dataclasses.fields(LoraSettings):
            value = getattr(settings, field.name)
            require(value == field.default, f"{flag_of(field.name)}: there are no adapters (--lora-rank 0). Give a rank or leave it out.")
        return
    _check_network(settings)
    _check_targets(settings)
    _check_nested(settings)


def _check_network(settings: Settings) -> None:
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


def _check_targets(settings: Settings) -> None:
    require(bool(settings.lora_targets), f"--lora-targets: empty with --lora-rank {settings.lora_rank}. Name some of {', '.join(TARGETS)}.")
    for target in settings.lora_targets:
        hint = nearest(target, TARGETS, f"Use some of {', '.join(TARGETS)}.")
        require(target in TARGETS, f"--lora-targets: {target!r} is no matrix of a layer. {hint}")
        require(settings.lora_targets.count(target) == 1, f"--lora-targets: {target} is named twice. Name it once.")
        rows, columns = target_shapes(settings)[target]
        require(
            settings.lora_rank <= min(rows, columns),
            f"--lora-rank: {settings.lora_rank} is more than the smaller side of {target} ({rows} x {columns}), which needs no more to "
            f"become any matrix. Give at most {min(rows, columns)}, or take {target} out of --lora-targets.",
        )


def _check_nested(settings: Settings) -> None:
    if not settings.dylora:
        for name in ("dylora_frozen", "dylora_ranks"):
            require(not getattr(settings, name), f"{flag_of(name)}: ranks are nested with --dylora only. Give it or leave this out.")
        return
    ranks = settings.dylora_ranks
    for rank in ranks:
        require(1 <= rank <= settings.lora_rank, f"--dylora-ranks: {rank} is not in 1..{settings.lora_rank} (--lora-rank). Change one.")
        require(ranks.count(rank) == 1, f"--dylora-ranks: {rank} stands twice. Each is drawn with the same probability; name it once.")
    require(
        not ranks or max(ranks) == settings.lora_rank,
        f"--dylora-ranks: {' '.join(map(str, ranks))}: the ranks above {max(ranks, default=0)} of --lora-rank {settings.lora_rank} would "
        "never train. Lower --lora-rank or add it to the list.",
    )
