"""Settings that many layout tables share."""

from collections.abc import Iterable
from itertools import combinations

import pytest

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
PP4 = {"pipeline_model_parallel_size": 4}
SP = {"sequence_parallel": True}
SEQUENCE = {**TP2, **SP}
CHUNKS = {"num_layers_per_virtual_pipeline_stage": 1}
DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAP = {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True}
OWN = {"use_exit_norm": True, "untie_exit_output_weights": True}
UNTIED = {"untie_embeddings_and_output_weights": True}
FSDP = {"data_parallel": "fsdp"}
SANDWICH = {"use_sandwich_norm": True, "attn_post_norm_scale": 0.3, "ffn_post_norm_scale": 0.6}
DEEP = {"num_layers": 8, "exit_layer_nums": (1, 4, 5, 7)}


AXES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "chunks": "num_layers_per_virtual_pipeline_stage",
    "sp": "sequence_parallel",
    "bf16": "bf16",
    "fp16": "fp16",
    "recompute": "recompute_granularity",
    "tied": "untie_embeddings_and_output_weights",
    "heads": "untie_exit_output_weights",
    "optimizer": "use_distributed_optimizer",
}
"""Settings whose values meet in pairs in the rows of ``pairwise``."""


def _pairs(row: tuple[int, dict]) -> set[frozenset]:
    """Return what a row covers: pairs of its values on the axes, and each other setting once."""
    world_size, changes = row
    ranks = changes.get(AXES["tp"], 1) * changes.get(AXES["pp"], 1)
    values = [
        ("dp", world_size // ranks),
        *((axis, changes.get(setting)) for axis, setting in AXES.items()),
    ]
    others = {
        frozenset([(name, str(value))])
        for name, value in changes.items()
        if name not in AXES.values()
    }
    return {frozenset(pair) for pair in combinations(values, 2)} | others


def pairwise(rows: dict[str, tuple[int, dict]], *kept: str) -> list:
    """Return the names of rows as parameters of a test; those that cover no new pair are long.

    Rows are chosen one by one, always the one that covers the most new pairs, until all pairs that
    any row covers are covered. The rest is for ``make test-all``, with the reason on the mark.

    Args:
        rows: {name: (number of processes, settings)}.
        kept: Names of rows that are everyday ones for a reason of their own.
    """
    shown: set[frozenset] = set()
    chosen = list(kept)
    for name in kept:
        shown |= _pairs(rows[name])
    left = {name: _pairs(row) for name, row in rows.items() if name not in kept}
    while left:
        name = max(left, key=lambda name: len(left[name] - shown))
        if not left[name] - shown:
            break
        chosen.append(name)
        shown |= left.pop(name)
    reason = f"each pair of its settings stands in one of: {', '.join(chosen)}"
    return [
        name if name in chosen else pytest.param(name, marks=pytest.mark.long(reason=reason))
        for name in rows
    ]


def all_but(rows: Iterable[str], reason: str, *long: str) -> list:
    """Return the names of rows as parameters of a test; ``long`` ones are for ``make test-all``."""
    rows = list(rows)
    assert all(name in rows for name in long), (
        f"{[name for name in long if name not in rows]}: no such rows"
    )
    return [
        pytest.param(name, marks=pytest.mark.long(reason=reason)) if name in long else name
        for name in rows
    ]


def thinned(rows: Iterable, *kept) -> list:
    """Return rows as parameters of a test; those not ``kept`` are long, for ``make test-all``."""
    rows = list(rows)
    assert all(row in rows for row in kept), (
        f"{[row for row in kept if row not in rows]}: no such rows"
    )
    return [row if row in kept else pytest.param(row, marks=pytest.mark.long) for row in rows]
