"""Words of layout tables: settings that stand in many of them."""

from collections.abc import Iterable

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


def thinned(rows: Iterable, *kept) -> list:
    """Returns the rows as parameters of a test; those that are not among ``kept`` are marked long, for ``make test-all``."""
    rows = list(rows)
    assert all(row in rows for row in kept), f"{[row for row in kept if row not in rows]}: no such rows"
    return [row if row in kept else pytest.param(row, marks=pytest.mark.long) for row in rows]
