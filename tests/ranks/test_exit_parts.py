"""Exits with parts of their own: in every layout they equal the reference in plain PyTorch."""

import pytest

from tests.ranks.test_layouts import compare
from tests.support.layouts import CHUNKS, OVERLAP, PP2, SP, TP2, pairwise, thinned
from tests.support.tiny import tiny

LAYOUTS = {
    "one process": (1, {}),
    "tp2": (2, TP2),
    "tp2 sequence parallel": (2, {**TP2, **SP}),
    "pp2": (2, PP2),
    "pp2 chunks2": (2, {**PP2, **CHUNKS}),
    "pp4": (4, {"pipeline_model_parallel_size": 4}),
    "tp2 pp2 sequence parallel": (4, {**TP2, **PP2, **SP}),
    "dp2 distributed overlap": (2, OVERLAP),
}
PARTS = {
    "block": {"use_exit_block": True},
    "mlp": {"use_exit_mlp": True},
    "adapter": {"exit_adapter_rank": 3},
    "block adapter own norm": {
        "use_exit_block": True,
        "exit_adapter_rank": 3,
        "use_exit_norm": True,
    },
}


@pytest.mark.parametrize("parts", thinned(PARTS, "mlp", "block adapter own norm"))
@pytest.mark.parametrize("layout", pairwise(LAYOUTS))
def test_exits_with_parts_equal_the_reference(layout, parts):
    world_size, changes = LAYOUTS[layout]
    compare(world_size, tiny(**changes, **PARTS[parts]), 1e-5)
