"""Layouts that might be better, tried one by one on paper."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from megatron_sorted.errors import SettingsError
from megatron_sorted.planning.devices import Device
from megatron_sorted.planning.estimate import Plan, make_plan
from megatron_sorted.planning.split import balanced_split, weights_of_layers, with_split
from megatron_sorted.settings.derived import global_batch_size
from megatron_sorted.settings.layout_rules import (
    check_batch,
    check_interleaving,
    check_layout,
    check_recompute,
)
from megatron_sorted.settings.model import check_model
from megatron_sorted.settings.parallel import check_data_parallel
from megatron_sorted.settings.run import Settings

RECOMPUTE = (
    {"recompute_granularity": "none"},
    {"recompute_granularity": "selective", "recompute_modules": ("mlp",)},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
)
LARGEST_MICRO_BATCH = 16
MOST_CHUNKS = 8
MOST_PARTS = 64
"""Chunks of all stages together."""


@dataclass(frozen=True)
class Proposal:
    """A layout and what it would take."""

    settings: Settings
    plan: Plan


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def candidates(
    settings: Settings, vocab_size: int, world_size: int, device: Device
) -> Iterator[Settings]:
    """Yield layouts of the same training on the same processes: those whose rules hold."""
    batch = global_batch_size(settings, world_size)

    @cache
    def split(stages: int, chunks: int, recompute: str) -> tuple[int, ...]:
        """Return a split: layers weigh the same against exits whatever the tensor size and the micro-batch."""
        return tuple(
            balanced_split(
                weights_of_layers(replace(settings, recompute_granularity=recompute), vocab_size),
                stages,
                chunks,
            )
        )

    for tp in (size for size in _divisors(world_size) if size <= device.per_host):
        for pp in (size for size in _divisors(world_size // tp) if size <= settings.num_layers):
            dp = world_size // tp // pp
            for micro in (
                size
                for size in _divisors(batch)
                if size <= LARGEST_MICRO_BATCH and batch % (size * dp) == 0
            ):
                for recompute in RECOMPUTE:
                    plain = replace(
                        settings,
                        tensor_model_parallel_size=tp,
                        pipeline_model_parallel_size=pp,
                        sequence_parallel=tp > 1,
                        micro_batch_size=micro,
                        global_batch_size=batch,
                        data_parallel="ddp",
                        use_distributed_optimizer=dp > 1 or settings.use_distributed_optimizer,
                        num_layers_per_virtual_pipeline_stage=None,
                        decoder_first_pipeline_num_layers=None,
                        decoder_last_pipeline_num_layers=None,
                        pipeline_model_parallel_layout=None,
                        **recompute,
                    )
                    most = min(MOST_CHUNKS, settings.num_layers // pp, MOST_PARTS // pp)
                    for chunks in [1] if pp == 1 else range(1, most + 1):
                        if chunks > 1 and batch // (micro * dp) % pp:
                            continue
                        candidate = plain
                        if pp > 1:
                            candidate = with_split(
                                plain, split(pp, chunks, plain.recompute_granularity)
                            )
                        if _allowed(candidate, world_size):
                            yield candidate
                    sharded = replace(
                        plain,
                        data_parallel="fsdp",
                        use_distributed_optimizer=False,
                        overlap_grad_reduce=False,
                        overlap_param_gather=False,
                    )
                    if dp > 1 and tp == pp == 1 and _allowed(sharded, world_size):
                        yield sharded


def _allowed(settings: Settings, world_size: int) -> bool:
    try:
        check_model(settings)
        check_layout(settings, world_size)
        check_batch(settings, world_size)
        check_interleaving(settings, world_size)
        check_recompute(settings)
        check_data_parallel(settings)
    except SettingsError:
        return False
    return True


def search(
    settings: Settings,
    vocab_size: int,
    world_size: int,
    device: Device,
    chunk_tokens: int,
    memory_bytes: int,
    progress: Callable[[int], None] = lambda tried: None,
) -> tuple[list[Proposal], int, int]:
    """Return the layouts that fit into ``memory_bytes`` a rank, the fastest first; how many were tried; the least memory any needs.

    A layout fits if it does although its plan may be as much too low as plans were measured to be (``Plan.needed_bytes``).
    """
    found, tried, least = [], 0, 0
    for tried, candidate in enumerate(candidates(settings, vocab_size, world_size, device), 1):
        progress(tried)
        plan = make_plan(candidate, vocab_size, world_size, device, chunk_tokens)
        least = min(least or plan.needed_bytes, plan.needed_bytes)
        if plan.needed_bytes <= memory_bytes:
            found.append(Proposal(candidate, plan))
    found.sort(key=lambda proposal: (proposal.plan.seconds, proposal.plan.peak_bytes))
    return found, tried, least
