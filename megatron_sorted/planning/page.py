"""A plan, and proposed layouts, as text in columns."""

import shlex
from collections.abc import Sequence
from dataclasses import fields

from megatron_sorted.planning.estimate import LOWEST_RATIO, Plan, StagePlan
from megatron_sorted.planning.search import Proposal
from megatron_sorted.planning.split import layout_text
from megatron_sorted.settings.derived import exit_depths, max_position_embeddings
from megatron_sorted.settings.field import flag_of
from megatron_sorted.settings.layout import layers_of_chunks
from megatron_sorted.settings.rope_scaling import names_scaling, rope_of
from megatron_sorted.settings.run import Settings

GB = 1e9
ERROR = f"{1 / LOWEST_RATIO - 1:.1%}"
"""By how much plans of memory were measured too low."""
LAYOUT = (
    "micro_batch_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "sequence_parallel",
    "use_distributed_optimizer",
    "recompute_granularity",
)
"""Settings shown of every proposed layout; all others are shown where the run has other values."""


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of right-aligned columns.

    >>> columns(["rank", "tp"], [["0", "12"]])
    ['  rank  tp', '     0  12']
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (head, *rows)
    ]


def _numbers(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers)) if numbers else "-"


def stage_lines(plan: Plan) -> list[str]:
    """Return layers and exits of every model chunk of every stage."""
    rows = [
        [
            str(stage.stage),
            str(chunk.chunk),
            f"{chunk.layers_before + 1}-{chunk.layers_before + chunk.num_layers}",
            str(chunk.num_layers),
            _numbers(chunk.exits),
        ]
        for stage in plan.stages
        for chunk in stage.chunks
    ]
    return columns(["stage", "chunk", "layers", "count", "exits"], rows)


def parameter_lines(plan: Plan) -> list[str]:
    """Return the parameters of one rank of every stage."""
    kinds = list(plan.stages[0].parameters)
    rows = [
        [
            str(stage.stage),
            *(f"{stage.parameters[kind]:,}" for kind in kinds),
            f"{sum(stage.parameters.values()):,}",
        ]
        for stage in plan.stages
    ]
    return columns(["stage", *kinds, "sum"], rows)


def memory_lines(plan: Plan) -> list[str]:
    """Return the memory of one rank of every stage."""
    names = [
        "weights",
        "gradients",
        "optimizer",
        "averages",
        "activations",
        "exit_loss",
        "layer_backward",
        "embedding_backward",
        "gathered",
        "update",
        "reserved",
    ]
    for name in ("averages", "gathered"):  # of some runs only
        if not any(getattr(stage.memory, name) for stage in plan.stages):
            names.remove(name)
    rows = [
        [
            str(stage.stage),
            *(f"{getattr(stage.memory, name) / GB:.3g}" for name in names),
            f"{stage.memory.total / GB:.3g}",
        ]
        for stage in plan.stages
    ]
    return columns(["stage", *(name.replace("_", " ") for name in names), "most at once"], rows)


def work_lines(plan: Plan) -> list[str]:
    """Return operations, time and messages of one rank of every stage."""
    kinds = ("tensor", "pipeline", "gradients", "parameters", "copies")

    def row(stage: StagePlan) -> list[str]:
        return [
            str(stage.stage),
            f"{stage.operations / 1e12:.6g}",
            f"{stage.exit_operations / 1e12:.4g}",
            f"{stage.busy_seconds:.3g}",
            *(f"{getattr(stage.messages, kind) / GB:.3g}" for kind in kinds),
        ]

    sent = ["sent: tensor", "pipeline", "gradients", "parameters", "copies GB"]
    head = ["stage", "TFLOP", "of exits", "busy s", *sent]
    return columns(head, [row(stage) for stage in plan.stages])


def rope_lines(settings: Settings) -> list[str]:
    """Return a line about scaled rotary positions; none where they are not scaled."""
    rope = rope_of(settings)
    if rope is None or not names_scaling(settings):
        return []
    return [
        f"rotary positions: {rope}; texts of up to {max_position_embeddings(settings):,} tokens"
    ]


def plan_lines(
    settings: Settings,
    plan: Plan,
    device: str,
    memory_bytes: int,
    launch: str,
    better: list[int] | None,
) -> list[str]:
    """Return a plan as lines of text.

    Args:
        settings: The run.
        plan: The run's plan.
        device: Name of the device.
        memory_bytes: The most memory of a rank.
        launch: The command that starts the run.
        better: Layers of each chunk in a faster split; None if there is none.
    """
    fits = "DOES NOT FIT"
    if plan.needed_bytes <= memory_bytes:
        fits = f"fits, with the {ERROR} to spare by which plans were measured too low"
    elif plan.peak_bytes <= memory_bytes:
        fits = f"MAY NOT FIT: plans were measured up to {ERROR} too low"
    chunks = f" x {plan.num_chunks} chunks" if plan.num_chunks > 1 else ""
    layout = f"tensor {plan.tensor_size} x pipeline {plan.pipeline_size}{chunks}"
    batch = f"{plan.num_micro_batches} micro-batches of {settings.micro_batch_size}"
    phases = ", ".join(f"{name} {seconds:.3g}" for name, seconds in plan.phases.items())
    rows = f", which keeps 1 of {plan.data_size} of their rows"
    lines = [
        f"{plan.world_size} processes: {layout} x data {plan.data_size}; "
        f"{batch}, {plan.tokens:,} tokens a step",
        f"parameters {plan.parameters:,}; stored with copies and padding "
        f"{plan.stored_parameters:,}; exits {_numbers(exit_depths(settings))}",
        *rope_lines(settings),
        "",
        "layers",
        *stage_lines(plan),
        "",
        "parameters of one rank" + rows * (settings.data_parallel == "fsdp"),
        *parameter_lines(plan),
        "",
        "memory of one rank, GB",
        *memory_lines(plan),
        "",
        "work of one rank in a step",
        *work_lines(plan),
        "",
        f"slowest stage: {plan.imbalance:.3f} times the mean of the stages' operations",
        f"step on {device}: {plan.seconds:.4g} s ({phases}); bubble {plan.bubble:.1%}; "
        f"{plan.tokens / plan.seconds:,.0f} tokens/s; MFU {plan.mfu:.1%}",
        f"memory: {plan.peak_bytes / GB:.1f} of {memory_bytes / GB:.1f} GB: {fits}",
    ]
    if better:
        lines.append(
            "layers that weigh as much as the exits let them: "
            f"--pipeline-model-parallel-layout '{layout_text(better)}'"
        )
    return [*lines, "", launch]


def layout_flags(settings: Settings, given: Settings) -> str:
    """Return the flags that turn the run ``given`` into the proposed layout ``settings``."""
    flags = []
    for name in (field.name for field in fields(settings)):
        value = getattr(settings, name)
        if name not in LAYOUT and value == getattr(given, name):
            continue
        if isinstance(value, bool):
            flags.append(flag_of(name if value else f"no_{name}"))
        else:
            values = value if isinstance(value, tuple) else ["none" if value is None else value]
            flags.append(shlex.join([flag_of(name), *map(str, values)]))
    return " ".join(flags)


def search_lines(
    given: Settings,
    proposals: list[Proposal],
    tried: int,
    least: int,
    memory_bytes: int,
    shown: int,
) -> list[str]:
    """Return the best layouts as lines of text.

    Args:
        given: The run.
        proposals: The layouts that fit, the fastest first.
        tried: Number of layouts tried.
        least: The least memory that any layout needs.
        memory_bytes: The most memory of a rank.
        shown: The most layouts to show.
    """
    limit = f"{memory_bytes / GB:.1f} GB a rank"
    if not proposals:
        return [
            f"none of {tried} layouts surely fits into {limit}; the smallest needs "
            f"{least / GB:.1f} GB, with {ERROR} for the plan's error. Use more processes, or a "
            "device with more memory."
        ]
    rows = []
    for proposal in proposals[:shown]:
        settings, plan = proposal.settings, proposal.plan
        layers = sorted(set(layers_of_chunks(settings)))
        sharded = " sharded" if settings.data_parallel == "fsdp" else ""
        rows.append(
            [
                f"{plan.seconds:.4g}",
                f"{plan.mfu:.1%}",
                f"{plan.peak_bytes / GB:.1f}",
                f"{plan.bubble:.1%}",
                f"{plan.imbalance:.3f}",
                str(plan.tensor_size),
                str(plan.pipeline_size),
                str(plan.num_chunks),
                f"{plan.data_size}{sharded}",
                str(settings.micro_batch_size),
                settings.recompute_granularity,
                f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0]),
            ]
        )
    head = [
        "s/step",
        "MFU",
        "GB",
        "bubble",
        "imbalance",
        "tp",
        "pp",
        "chunks",
        "dp",
        "micro",
        "recompute",
    ]
    return [
        f"{len(proposals)} of {tried} layouts fit into {limit}, with {ERROR} to spare for the "
        "plan's error; the fastest:",
        *columns([*head, "layers of a chunk"], rows),
        "",
        f"the first: {layout_flags(proposals[0].settings, given)}",
    ]
