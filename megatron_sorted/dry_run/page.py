"""The result of a dry run as text in columns."""

from megatron_sorted.dry_run.ranks import DryRun
from megatron_sorted.planning.page import GB, columns


def dry_run_lines(run: DryRun) -> list[str]:
    """Return the result of a dry run as lines of text."""
    stepped = [rank for rank in run.ranks.values() if rank.flops is not None]
    rows = [
        [
            str(rank.place.rank),
            str(rank.place.stage),
            str(rank.place.tensor_rank),
            str(rank.place.data_rank),
            f"{rank.parameters:,}",
            f"{rank.flops / 1e12:.6f}",
            f"{rank.planned_flops / 1e12:.6f}",
            f"{sum(rank.collectives.values()) / GB:.4g}",
            f"{sum(rank.planned_collectives.values()) / GB:.4g}",
            str(sum(map(len, rank.sent.values()))),
        ]
        for rank in stepped
    ]
    head = ["rank", "stage", "tp", "dp", "parameters", "TFLOP counted", "planned"]
    lines = [
        f"built {len(run.ranks)} ranks, a step of {run.micro_batches} micro-batches on "
        f"{len(stepped)} of them:",
        *columns([*head, "collectives, GB", "planned", "messages"], rows),
        f"{run.messages} messages between ranks compared with what their receivers expect",
    ]
    return [*lines, *(run.problems or ["everything as planned"])]
