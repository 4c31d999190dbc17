"""The plan of a run: everything a step takes, stage by stage, and how long it lasts."""

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
from megatron_sorted.planning.operations import (
    Operations,
    operations_of_chunk,
    real_rows,
    recomputed_layers,
)
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
from megatron_sorted.settings.run import Settings

TRAFFIC = 2.5
"""Bytes that a layer's kernels other than matrix products move in forward, for each byte that is kept; backward moves twice that."""
LOGIT_BYTES = 20
"""Moved for each logit: written, its maximum found, exponentiated and summed in fp32, made a gradient, read by two products."""
LOWEST_RATIO = 0.93
"""Least ratio of a planned peak of memory to the measured one (docs/results/plan.md); what is proposed must fit with this to spare."""
EXPOSED = 0.2
"""Share of an overlapped collective over data parallel ranks that is waited for."""


@dataclass(frozen=True)
class StagePlan:
    """One stage: what one of its ranks holds, computes, keeps and sends in a step.

    Attributes:
        parameters: {what: number} on one rank; fully sharded, of which it keeps its share of rows.
        operations: Of matrix products, attention over all pairs of tokens, on the rank with the most.
        exit_operations: Of them those of exits.
        busy_seconds: Of the step's time.
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
        parameters: Of the network, copies and padding counted once.
        stored_parameters: On all ranks of one data parallel copy, with copies of heads and norms and padding.
        seconds: Of a step.
        bubble: Share of the passes' time in which the stage that computes longest waits.
        imbalance: Operations of the stage with the most over the mean of the stages.
        model_operations: Of a step over all devices as MFU counts them: causal attention at half, nothing for recomputation.
        phases: {part of the step: seconds}.
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
        """Return the memory of the rank that needs most."""
        return max(stage.memory.total for stage in self.stages)

    @property
    def needed_bytes(self) -> int:
        """Return the memory that a rank must have for the run to fit although the plan may be too low."""
        return round(self.peak_bytes / LOWEST_RATIO)


def peak_rate(settings: Settings, device: Device) -> float:
    """Return the device's peak at the run's precision, in operations a second."""
    return device.half_flops if element_bytes(settings) == 2 else device.single_flops


class Clock:
    """How long a rank takes for what it does on a device that it may share."""

    def __init__(
        self, settings: Settings, vocab_size: int, world_size: int, device: Device, links: Links
    ):
        # cores are shared where there are more processes than cores; other devices have one process each
        share = 1.0 if device.fused else min(1.0, device.per_host / world_size)
        self.settings, self.vocab_size, self.device, self.links = (
            settings,
            vocab_size,
            device,
            links,
        )
        self.rate = peak_rate(settings, device) * device.efficiency * share
        self.memory_rate = device.memory_rate * share

    def products(self, matrices: int, attention: int) -> float:
        """Return seconds of matrix products; the attention kernel leaves out the half of the pairs that is masked."""
        return (matrices + attention / 2) / self.rate

    def _kernels(self, seconds: float, passes: int) -> float:
        """Return the seconds of ``passes`` layers: a queue that is kept filled hides the host's delay, a host that computes does not."""
        least = passes * self.device.kernel_delay
        return max(seconds, least) if self.device.fused else seconds + least

    def chunk(self, work: ChunkWork, operations: Operations) -> tuple[float, float]:
        """Return seconds of one micro-batch's forward and backward in a chunk."""
        settings = self.settings
        moved = (
            TRAFFIC * layer_bytes(settings, self.vocab_size, self.device.fused) / self.memory_rate
        )
        forward = self._kernels(
            self.products(operations.forward, operations.forward_attention)
            + work.num_layers * moved,
            work.num_layers,
        )
        again = recomputed_layers(settings, work.segments)
        matrices = operations.backward + operations.recompute
        attention = operations.backward_attention + operations.recompute_attention
        backward = self._kernels(
            self.products(matrices, attention) + (2 * work.num_layers + again) * moved,
            2 * work.num_layers + again,
        )
        tokens = settings.micro_batch_size * settings.seq_length
        logits = len(work.trained) * tokens * real_rows(settings, self.vocab_size, 0)
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
        settings: The run; ``check_settings`` has passed it.
        vocab_size: Real tokens.
        world_size: Processes.
        device: What each runs on.
        chunk_tokens: Tokens whose logits exist at one time unless the settings say.

    Raises:
        SettingsError: The settings ask for something that a plan does not count.
    """
    check_plannable(settings)
    chunks, stages = work_of_chunks(settings), settings.pipeline_model_parallel_size
    micro_batches, links = (
        num_micro_batches(settings, world_size),
        links_of(settings, world_size, device),
    )
    clock = Clock(settings, vocab_size, world_size, device, links)
    forward, backward, rows = [], [], []
    for stage in range(stages):
        mine = [chunk for chunk in chunks if chunk.stage == stage]
        operations = [operations_of_chunk(settings, chunk, vocab_size) for chunk in mine]
        times = [
            clock.chunk(chunk, counted) for chunk, counted in zip(mine, operations, strict=True)
        ]
        forward.append([seconds for seconds, _ in times])
        backward.append([seconds for _, seconds in times])
        held = [parameters_on_rank(settings, chunk, vocab_size) for chunk in mine]
        rows.append(
            (
                mine,
                {what: sum(each[what] for each in held) for what in held[0]},
                micro_batches * sum(each.total for each in operations),
                micro_batches * sum(each.exits for each in operations),
            )
        )
    pipeline_rate, pipeline_delay = links.pipeline
    passes = time_of_passes(
        forward, backward, state_bytes(settings) / pipeline_rate + pipeline_delay, micro_batches
    )
    plans = tuple(
        StagePlan(
            stage,
            tuple(mine),
            parameters,
            operations,
            exits,
            memory_of_stage(settings, mine, vocab_size, world_size, device, chunk_tokens),
            messages_of_stage(settings, chunks, stage, vocab_size, world_size),
            passes.busy_seconds[stage],
        )
        for stage, (mine, parameters, operations, exits) in enumerate(rows)
    )
    phases = {
        "passes": passes.seconds,
        **_after_passes(
            settings, plans, links, clock, data_parallel_size(settings, world_size), passes.seconds
        ),
    }
    seconds = sum(phases.values())
    tokens = global_batch_size(settings, world_size) * settings.seq_length
    model_operations = tokens * train_flops_per_token(settings, vocab_size)
    counted = [plan.operations for plan in plans]
    stored = settings.tensor_model_parallel_size * sum(
        sum(plan.parameters.values()) for plan in plans
    )
    return Plan(
        world_size,
        settings.tensor_model_parallel_size,
        stages,
        data_parallel_size(settings, world_size),
        len(plans[0].chunks),
        micro_batches,
        tokens,
        plans,
        network_parameters(settings, vocab_size),
        stored,
        seconds,
        max(0.0, 1 - max(passes.busy_seconds) / passes.seconds),
        max(counted) * stages / sum(counted),
        model_operations,
        model_operations / seconds / world_size / peak_rate(settings, device),
        phases,
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
    """Return {part: seconds} of what the passes do not hide, for the stage that takes longest at each."""
    rate, delay = links.data
    pipeline_rate, pipeline_delay = links.pipeline
    several, in_rows = (
        data_size > 1,
        settings.data_parallel == "fsdp",
    )  # whose collectives torch overlaps
    # a first buffer is reduced, or gathered, before anything can hide it
    reduce, gather = (
        max(getattr(stage.messages, kind) for stage in stages) / rate
        for kind in ("gradients", "parameters")
    )
    if in_rows and several:  # all that the passes have no time to hide is waited for as well
        share = max(EXPOSED, 1 - passes_seconds / (reduce + gather))
        reduce, gather = reduce * share, gather * share
    else:
        reduce *= EXPOSED if settings.overlap_grad_reduce else 1
        gather *= EXPOSED if settings.overlap_param_gather else 1
    copies = max(stage.messages.copies for stage in stages)
    parameters = max(sum(stage.parameters.values()) for stage in stages)
    updated = (
        parameters / data_size if settings.use_distributed_optimizer or in_rows else parameters
    )
    per_parameter = (
        40 if clock.device.fused else 100
    )  # one kernel reads and writes all states, or one after another
    return {
        "gradients": reduce + several * delay,
        "copies": copies / pipeline_rate + (pipeline_delay if copies else 0),
        "optimizer": (updated * per_parameter + (updated if in_rows else parameters) * 8)
        / clock.memory_rate,
        "parameters": gather,
    }
