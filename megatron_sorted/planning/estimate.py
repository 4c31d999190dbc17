"""The plan of a run: parameters, memory, operations and messages of each stage, and time."""

from dataclasses import dataclass, replace

from megatron_sorted.planning.devices import Device
from megatron_sorted.planning.memory import RankMemory, layer_bytes, memory_of_stage
from megatron_sorted.planning.messages import (
    Links,
    Messages,
    collectives_of_chunk,
    links_of,
    messages_of_stage,
    ring,
    state_bytes,
)
from megatron_sorted.planning.operations import Operations, operations_of_chunk, recomputed_layers
from megatron_sorted.planning.schedule import time_of_passes
from megatron_sorted.planning.work import (
    ChunkWork,
    check_plannable,
    element_bytes,
    parameters_on_rank,
    work_of_chunks,
)
from megatron_sorted.settings.costs import train_flops_per_token
from megatron_sorted.settings.derived import (
    data_parallel_size,
    global_batch_size,
    num_micro_batches,
)
from megatron_sorted.settings.layout import vocabulary_rows
from megatron_sorted.settings.run import Settings

TRAFFIC = 2.5
"""Bytes moved in forward by a layer's kernels other than matrix products, for each kept byte.

Backward moves twice that.
"""
LOGIT_BYTES = 20
"""Bytes moved for each logit.

It is written, compared, exponentiated and summed in fp32, turned into a gradient and read by two
products.
"""
LOWEST_RATIO = 0.93
"""Lowest ratio of a planned memory peak to the measured one (docs/results/plan.md).

Proposed layouts must fit even if their plan is too low by this ratio.
"""
EXPOSED = 0.2
"""Share of an overlapped collective over data parallel ranks that a step still waits for."""


@dataclass(frozen=True)
class StagePlan:
    """One rank of a stage in a step.

    Attributes:
        parameters: Number of parameters by kind; a fully sharded rank keeps a share of their rows.
        operations: Operations of matrix products, with attention over all pairs of tokens, on the
            rank with the most.
        exit_operations: The part of the operations that belongs to exits.
        busy_seconds: Time in which the stage computes.
    """

    stage: int
    chunks: tuple[ChunkWork, ...]
    parameters: dict[str, int]
    operations: int
    exit_operations: int
    memory: RankMemory
    messages: Messages
    busy_seconds: float


@dataclass(frozen=True)
class Plan:
    """A whole run.

    Attributes:
        parameters: Number of the network's parameters, without copies and padding.
        stored_parameters: Number of parameters on all ranks of one data parallel copy, with copies
            of heads and norms and padding.
        seconds: Time of a step.
        bubble: Share of the passes' time in which the stage that computes longest waits.
        imbalance: Operations of the stage with the most over the mean of the stages.
        model_operations: Operations of a step over all devices as MFU counts them: half of the
            pairs in attention, nothing for recomputation.
        phases: Seconds of each part of the step.
    """

    world_size: int
    tensor_size: int
    pipeline_size: int
    data_size: int
    num_chunks: int
    num_micro_batches: int
    tokens: int
    stages: tuple[StagePlan, ...]
    parameters: int
    stored_parameters: int
    seconds: float
    bubble: float
    imbalance: float
    model_operations: int
    mfu: float
    phases: dict[str, float]

    @property
    def peak_bytes(self) -> int:
        """Return the memory of the rank that needs the most."""
        return max(stage.memory.total for stage in self.stages)

    @property
    def needed_bytes(self) -> int:
        """Return the memory that a rank needs if the plan is too low by the largest known error."""
        return round(self.peak_bytes / LOWEST_RATIO)


def peak_rate(settings: Settings, device: Device) -> float:
    """Return the device's peak at the run's precision, in operations a second."""
    return device.half_flops if element_bytes(settings) == 2 else device.single_flops


class Clock:
    """The time of a rank's work on a device that several processes may share."""

    def __init__(
        self, settings: Settings, vocab_size: int, world_size: int, device: Device, links: Links
    ):
        # Processes share cores if there are more of them than cores; other devices have one each.
        share = 1.0 if device.fused else min(1.0, device.per_host / world_size)
        self.settings, self.vocab_size = settings, vocab_size
        self.device, self.links = device, links
        self.rate = peak_rate(settings, device) * device.efficiency * share
        self.memory_rate = device.memory_rate * share

    def products(self, matrices: int, attention: int) -> float:
        """Return seconds of matrix products; attention kernels skip the masked half of pairs."""
        return (matrices + attention / 2) / self.rate

    def _kernels(self, seconds: float, passes: int) -> float:
        """Return the seconds of ``passes`` layers with their launch latency.

        It overlaps with execution on accelerators; on CPU it adds up.
        """
        least = passes * self.device.kernel_delay
        return max(seconds, least) if self.device.fused else seconds + least

    def chunk(self, work: ChunkWork, operations: Operations) -> tuple[float, float]:
        """Return the seconds of one micro-batch's forward and backward in a model chunk."""
        settings = self.settings
        kept = layer_bytes(settings, self.vocab_size, self.device.fused)
        moved = TRAFFIC * kept / self.memory_rate
        passes = work.num_layers
        products = self.products(operations.forward, operations.forward_attention)
        forward = self._kernels(products + passes * moved, passes)
        passes = 2 * work.num_layers + recomputed_layers(settings, work.segments)
        products = self.products(
            operations.backward + operations.recompute,
            operations.backward_attention + operations.recompute_attention,
        )
        backward = self._kernels(products + passes * moved, passes)
        tokens = settings.micro_batch_size * settings.seq_length
        rows = len(vocabulary_rows(settings, self.vocab_size, 0))
        logits = len(work.trained) * tokens * rows
        backward += operations.exits / self.rate + logits * LOGIT_BYTES / self.memory_rate
        rate, delay = self.links.tensor
        size = tokens * settings.hidden_size * element_bytes(settings)
        waits = [
            count * (ring(size, settings.tensor_model_parallel_size) / rate + delay)
            for count in collectives_of_chunk(settings, work)
        ]
        return forward + waits[0], backward + waits[1]


def make_plan(
    settings: Settings, vocab_size: int, world_size: int, device: Device, chunk_tokens: int
) -> Plan:
    """Return the plan of a run.

    Args:
        settings: The run, checked by ``check_settings``.
        vocab_size: Number of real tokens.
        world_size: Number of processes.
        device: The device of each process.
        chunk_tokens: Tokens whose logits exist at one time unless the settings give their number.

    Raises:
        SettingsError: The settings request something that a plan does not count.
    """
    check_plannable(settings)
    chunks, num_stages = work_of_chunks(settings), settings.pipeline_model_parallel_size
    by_stage = [[chunk for chunk in chunks if chunk.stage == it] for it in range(num_stages)]
    micro_batches = num_micro_batches(settings, world_size)
    links = links_of(settings, world_size, device)
    clock = Clock(settings, vocab_size, world_size, device, links)
    operations = [
        [operations_of_chunk(settings, chunk, vocab_size) for chunk in mine] for mine in by_stage
    ]
    times = [
        [clock.chunk(*pair) for pair in zip(mine, counted, strict=True)]
        for mine, counted in zip(by_stage, operations, strict=True)
    ]
    pipeline_rate, pipeline_delay = links.pipeline
    passes = time_of_passes(
        [[forward for forward, _ in of_stage] for of_stage in times],
        [[backward for _, backward in of_stage] for of_stage in times],
        state_bytes(settings) / pipeline_rate + pipeline_delay,
        micro_batches,
    )

    def plan_stage(stage: int) -> StagePlan:
        mine = by_stage[stage]
        held = [parameters_on_rank(settings, chunk, vocab_size) for chunk in mine]
        return StagePlan(
            stage=stage,
            chunks=tuple(mine),
            parameters={kind: sum(each[kind] for each in held) for kind in held[0]},
            operations=micro_batches * sum(each.total for each in operations[stage]),
            exit_operations=micro_batches * sum(each.exits for each in operations[stage]),
            memory=memory_of_stage(settings, mine, vocab_size, world_size, device, chunk_tokens),
            messages=messages_of_stage(settings, chunks, stage, vocab_size, world_size),
            busy_seconds=passes.busy_seconds[stage],
        )

    stages = tuple(map(plan_stage, range(num_stages)))
    data_size = data_parallel_size(settings, world_size)
    after = _after_passes(settings, stages, links, clock, data_size, passes.seconds)
    phases = {"passes": passes.seconds, **after}
    seconds = sum(phases.values())
    tokens = global_batch_size(settings, world_size) * settings.seq_length
    model_operations = tokens * train_flops_per_token(settings, vocab_size)
    counted = [stage.operations for stage in stages]
    stored = sum(sum(stage.parameters.values()) for stage in stages)
    return Plan(
        world_size=world_size,
        tensor_size=settings.tensor_model_parallel_size,
        pipeline_size=num_stages,
        data_size=data_size,
        num_chunks=len(by_stage[0]),
        num_micro_batches=micro_batches,
        tokens=tokens,
        stages=stages,
        parameters=network_parameters(settings, vocab_size),
        stored_parameters=settings.tensor_model_parallel_size * stored,
        seconds=seconds,
        bubble=max(0.0, 1 - max(passes.busy_seconds) / passes.seconds),
        imbalance=max(counted) * num_stages / sum(counted),
        model_operations=model_operations,
        mfu=model_operations / seconds / world_size / peak_rate(settings, device),
        phases=phases,
    )


def network_parameters(settings: Settings, vocab_size: int) -> int:
    """Return the parameters of the whole network with all its exits, without copies and padding."""
    alone = replace(
        settings,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        sequence_parallel=False,
        num_layers_per_virtual_pipeline_stage=None,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
        pipeline_model_parallel_layout=None,
        make_vocab_size_divisible_by=1,
    )
    return sum(
        sum(parameters_on_rank(alone, chunk, vocab_size).values())
        for chunk in work_of_chunks(alone)
    )


def _after_passes(
    settings: Settings,
    stages: tuple[StagePlan, ...],
    links: Links,
    clock: Clock,
    data_size: int,
    passes_seconds: float,
) -> dict[str, float]:
    """Return the seconds of each part of a step that passes do not hide, on the slowest stage."""
    rate, delay = links.data
    pipeline_rate, pipeline_delay = links.pipeline
    several, in_rows = data_size > 1, settings.data_parallel == "fsdp"
    # A first buffer is reduced, or gathered, before anything can hide it.
    reduce, gather = (
        max(getattr(stage.messages, kind) for stage in stages) / rate
        for kind in ("gradients", "parameters")
    )
    if in_rows and several:  # torch overlaps these; a step waits for what passes cannot hide
        share = max(EXPOSED, 1 - passes_seconds / (reduce + gather))
        reduce, gather = reduce * share, gather * share
    else:
        reduce *= EXPOSED if settings.overlap_grad_reduce else 1
        gather *= EXPOSED if settings.overlap_param_gather else 1
    copies = max(stage.messages.copies for stage in stages)
    parameters = max(sum(stage.parameters.values()) for stage in stages)
    shares = settings.use_distributed_optimizer or in_rows
    updated = parameters / data_size if shares else parameters
    # One kernel reads and writes all states, or several do so one after another.
    update = updated * (40 if clock.device.fused else 100)
    update += (updated if in_rows else parameters) * 8
    return {
        "gradients": reduce + several * delay,
        "copies": copies / pipeline_rate + (pipeline_delay if copies else 0),
        "optimizer": update / clock.memory_rate,
        "parameters": gather,
    }
