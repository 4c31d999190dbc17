"""Search for faster layouts of a run, by planning each one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from megatron_sorted.errors import SettingsError
from megatron_sorted.planning.devices import Device
from megatron_sorted.planning.estimate import Plan, make_plan
from megatron_sorted.planning.split import balanced_split, weights_of_layers, with_split
from megatron_sorted.settings.derived import global_batch_size
from megatron_sorted.settings.layout import layers_of_chunks, num_virtual_chunks
from megatron_sorted.settings.layout_rules import (
    check_batch,
    check_interleaving,
    check_layout,
    check_recompute,
)
from megatron_sorted.settings.model import check_model
from megatron_sorted.settings.parallel import check_data_parallel
from megatron_sorted.settings.rules import check_settings
from megatron_sorted.settings.run import Settings

RECOMPUTE = (
    {"recompute_granularity": "none"},
    {"recompute_granularity": "selective", "recompute_modules": ("mlp",)},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
)
LARGEST_MICRO_BATCH = 16
MAX_CHUNKS = 8
MAX_PARTS = 64
"""The most model chunks of all stages together."""


@dataclass(frozen=True)
class Proposal:
    """A layout and its plan."""

    settings: Settings
    plan: Plan


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def candidates(
    settings: Settings, vocab_size: int, world_size: int, device: Device
) -> Iterator[Settings]:
    """Yield the allowed layouts of the same training on the same processes."""
    batch = global_batch_size(settings, world_size)

    @cache
    def split(stages: int, chunks: int, recompute: str) -> tuple[int, ...]:
        """Return a balanced split, whose weights do not depend on tensor size and micro-batch."""
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
                    most = min(MAX_CHUNKS, settings.num_layers // pp, MAX_PARTS // pp)
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
    """Return the layouts that fit, the fastest first; the number tried; the least memory needed.

    A layout fits if ``Plan.needed_bytes`` does, which allows for the largest error of plans.

    Args:
        settings: The run.
        vocab_size: Number of real tokens.
        world_size: Number of processes.
        device: The device of each process.
        chunk_tokens: Tokens whose logits exist at one time unless the settings give their number.
        memory_bytes: The most memory of a rank.
        progress: Called with the number of layouts tried so far.
    """
    proposals, tried, least = [], 0, 0
    for tried, candidate in enumerate(candidates(settings, vocab_size, world_size, device), 1):
        progress(tried)
        plan = make_plan(candidate, vocab_size, world_size, device, chunk_tokens)
        least = min(least or plan.needed_bytes, plan.needed_bytes)
        if plan.needed_bytes <= memory_bytes:
            proposals.append(Proposal(candidate, plan))
    proposals.sort(key=lambda proposal: (proposal.plan.seconds, proposal.plan.peak_bytes))
    return proposals, tried, least


def better_split(
    settings: Settings, plan: Plan, device: Device, chunk_tokens: int
) -> list[int] | None:
    """Return the layers of each chunk in a split with a faster step; None if there is none.

    It needs no more memory than the device has, or than the run needs now.

    Args:
        settings: The run.
        plan: The run's plan.
        device: The device of each process.
        chunk_tokens: Tokens whose logits exist at one time unless the settings give their number.
    """
    if plan.pipeline_size == 1:
        return None
    weights = weights_of_layers(settings, settings.vocab_size)
    lengths = balanced_split(weights, plan.pipeline_size, num_virtual_chunks(settings))
    if lengths == layers_of_chunks(settings):
        return None
    moved = with_split(settings, lengths)
    try:
        check_settings(moved, plan.world_size)
    except SettingsError:
        return None
    other = make_plan(moved, settings.vocab_size, plan.world_size, device, chunk_tokens)
    fits = other.needed_bytes <= max(device.memory_bytes, plan.needed_bytes)
    return lengths if fits and other.seconds < plan.seconds else None
