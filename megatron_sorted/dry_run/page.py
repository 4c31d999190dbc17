"""A plan in words and columns."""

import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from megatron_sorted.planning.estimate import LOWEST_RATIO, Plan, StagePlan
from megatron_sorted.planning.search import Proposal
from megatron_sorted.planning.split import layout_text
from megatron_sorted.settings.derived import exit_depths
from megatron_sorted.settings.field import flag_of
from megatron_sorted.settings.layout import layers_of_chunks
from megatron_sorted.settings.run import Settings

if TYPE_CHECKING:  # torch is needed for a dry run alone
    from megatron_sorted.dry_run.ranks import DryRun

GB = 1e9
LAYOUT = (
    "micro_batch_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "sequence_parallel",
    "use_distributed_optimizer",
    "recompute_granularity",
)
"""What is said of every layout that is proposed; all else only where the run says otherwise."""


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (head, *rows)
    ]


def _spans(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers)) if numbers else "-"


def stage_lines(plan: Plan) -> list[str]:
    """Return layers, exits and parameters of every chunk of every stage."""
    rows = []
    for stage in plan.stages:
        for chunk in stage.chunks:
            last = chunk.first_layer + chunk.num_layers
            rows.append(
                [
                    str(stage.stage),
                    str(chunk.chunk),
                    f"{chunk.first_layer + 1}-{last}",
                    str(chunk.num_layers),
                    _spans(chunk.exits),
                ]
            )
    return _columns(["stage", "chunk", "layers", "count", "exits"], rows)


def parameter_lines(plan: Plan) -> list[str]:
    """Return the parameters of one rank of every stage."""
    kinds = list(plan.stages[0].parameters)
    return _columns(
        ["stage", *kinds, "sum"],
        [
            [
                str(stage.stage),
                *(f"{stage.parameters[kind]:,}" for kind in kinds),
                f"{sum(stage.parameters.values()):,}",
            ]
            for stage in plan.stages
        ],
    )


def memory_lines(plan: Plan) -> list[str]:
    """Return the memory of one rank of every stage."""
    names = [
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "exit_loss",
        "layer_backward",
        "embedding_backward",
        "update",
        "reserved",
    ]
    if any(stage.memory.gathered for stage in plan.stages):
        names.insert(names.index("update"), "gathered")
    return _columns(
        ["stage", *(name.replace("_", " ") for name in names), "most at once"],
        [
            [
                str(stage.stage),
                *(f"{getattr(stage.memory, name) / GB:.3g}" for name in names),
                f"{stage.memory.total / GB:.3g}",
            ]
            for stage in plan.stages
        ],
    )


def work_lines(plan: Plan) -> list[str]:
    """Return operations, time and messages of one rank of every stage."""

    def row(stage: StagePlan) -> list[str]:
        sent = stage.messages
        return [
            str(stage.stage),
            f"{stage.operations / 1e12:.6g}",
            f"{stage.exit_operations / 1e12:.4g}",
            f"{stage.busy_seconds:.3g}",
            *(
                f"{size / GB:.3g}"
                for size in (
                    sent.tensor,
                    sent.pipeline,
                    sent.gradients,
                    sent.parameters,
                    sent.copies,
                )
            ),
        ]

    head = [
        "stage",
        "TFLOP",
        "of exits",
        "busy s",
        "sent: tensor",
        "pipeline",
        "gradients",
        "parameters",
        "copies GB",
    ]
    return _columns(head, [row(stage) for stage in plan.stages])


def plan_lines(
    settings: Settings,
    plan: Plan,
    device: str,
    memory_bytes: int,
    launch: str,
    better: list[int] | None,
) -> list[str]:
    """Return a plan as lines of text; ``better`` is a split of layers that weighs exits against layers, if it is another one."""
    error = f"{1 / LOWEST_RATIO - 1:.1%}"
    fits = (
        f"fits, with the {error} to spare by which plans were measured too low"
        if plan.needed_bytes <= memory_bytes
        else f"MAY NOT FIT: plans were measured up to {error} too low"
        if plan.peak_bytes <= memory_bytes
        else "DOES NOT FIT"
    )
    chunks = f" x {plan.num_chunks} chunks" if plan.num_chunks > 1 else ""
    after = ", ".join(f"{name} {seconds:.3g}" for name, seconds in plan.phases.items())
    lines = [
        f"{plan.world_size} processes: tensor {plan.tensor_size} x pipeline {plan.pipeline_size}{chunks} x data {plan.data_size}; "
        f"{plan.num_micro_batches} micro-batches of {settings.micro_batch_size}, {plan.tokens:,} tokens a step",
        f"parameters {plan.parameters:,}; stored with copies and padding {plan.stored_parameters:,}; exits "
        f"{_spans(exit_depths(settings))}",
        "",
        "layers",
        *stage_lines(plan),
        "",
        "parameters of one rank"
        + (
            f", which keeps 1 of {plan.data_size} of their rows"
            * (settings.data_parallel == "fsdp")
        ),
        *parameter_lines(plan),
        "",
        "memory of one rank, GB",
        *memory_lines(plan),
        "",
        "work of one rank in a step",
        *work_lines(plan),
        "",
        f"slowest stage: {plan.imbalance:.3f} times the mean of the stages' operations",
        f"step on {device}: {plan.seconds:.4g} s ({after}); bubble {plan.bubble:.1%}; {plan.tokens / plan.seconds:,.0f} tokens/s; "
        f"MFU {plan.mfu:.1%}",
        f"memory: {plan.peak_bytes / GB:.1f} of {memory_bytes / GB:.1f} GB: {fits}",
    ]
    if better:
        lines.append(
            f"layers that weigh as much as the exits let them: --pipeline-model-parallel-layout '{layout_text(better)}'"
        )
    return [*lines, "", launch]


def layout_flags(settings: Settings, given: Settings) -> str:
    """Return the flags of a layout that was found, such that the run ``given`` becomes it with them."""
    flags = []
    for name in (field.name for field in fields(settings)):
        value = getattr(settings, name)
        if name not in LAYOUT and value == getattr(given, name):
            continue
        if isinstance(value, bool):
            flags.append(flag_of(name if value else f"no_{name}"))
        else:
            words = value if isinstance(value, tuple) else ["none" if value is None else value]
            flags.append(shlex.join([flag_of(name), *map(str, words)]))
    return " ".join(flags)


def search_lines(
    given: Settings,
    proposals: list[Proposal],
    tried: int,
    least: int,
    memory_bytes: int,
    shown: int,
) -> list[str]:
    """Return the best layouts of the run ``given`` as lines of text."""
    if not proposals:
        return [
            f"none of {tried} layouts surely fits into {memory_bytes / GB:.1f} GB a rank; the smallest needs {least / GB:.1f} GB, with "
            f"{1 / LOWEST_RATIO - 1:.1%} for the plan's error. Use more "
            "processes, or a device with more memory."
        ]
    rows = []
    for proposal in proposals[:shown]:
        settings, plan = proposal.settings, proposal.plan
        layers = layers_of_chunks(settings)
        spread = f"{min(layers)}-{max(layers)}" if min(layers) != max(layers) else str(layers[0])
        recompute = settings.recompute_granularity
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
                f"{plan.data_size}{' sharded' * (settings.data_parallel == 'fsdp')}",
                str(settings.micro_batch_size),
                recompute,
                spread,
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
        "layers of a chunk",
    ]
    return [
        f"{len(proposals)} of {tried} layouts fit into {memory_bytes / GB:.1f} GB a rank, with {1 / LOWEST_RATIO - 1:.1%} to spare for "
        "the plan's error; the fastest:",
        *_columns(head, rows),
        "",
        f"the first: {layout_flags(proposals[0].settings, given)}",
    ]


def dry_run_lines(run: "DryRun") -> list[str]:
    """Return what a dry run found."""
    stepped = [one for one in run.ranks.values() if one.flops is not None]
    rows = [
        [
            str(one.place.rank),
            str(one.place.stage),
            str(one.place.tensor_rank),
            str(one.place.data_rank),
            f"{one.parameters:,}",
            f"{one.flops / 1e12:.6f}",
            f"{one.planned_flops / 1e12:.6f}",
            *(
                f"{sum(each.values()) / GB:.4g}"
                for each in (one.collectives, one.planned_collectives)
            ),
            str(sum(map(len, one.sent.values()))),
        ]
        for one in stepped
    ]
    lines = [
        f"built {len(run.ranks)} ranks, a step of {run.micro_batches} micro-batches on {len(stepped)} of them:",
        *_columns(
            [
                "rank",
                "stage",
                "tp",
                "dp",
                "parameters",
                "TFLOP counted",
                "planned",
                "collectives, GB",
                "planned",
                "messages",
            ],
            rows,
        ),
        f"{run.messages} messages between ranks compared with what their receivers expect",
    ]
    return [*lines, *run.problems] if run.problems else [*lines, "everything as planned"]
