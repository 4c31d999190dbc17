"""Mixtures of experts in every layout: losses, gradients and weights equal plain PyTorch's."""

import pytest
from torch.distributed.checkpoint import FileSystemReader

from megatron_sorted.errors import PlatformError
from megatron_sorted.model.config import can_route_without_transformer_engine, check_platform
from megatron_sorted.platform.cpu import CpuPlatform
from tests.ranks.test_layouts import compare
from tests.support.layouts import CHUNKS, DISTRIBUTED, OVERLAP, OWN, PP2, SEQUENCE, UNTIED
from tests.support.rank_bodies import steps_from
from tests.support.ranks import run_ranks
from tests.support.same_state import assert_same_state
from tests.support.tiny import tiny

EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 24}
EP2 = {"expert_model_parallel_size": 2}
ALL_TO_ALL = {"moe_token_dispatcher_type": "alltoall"}
BALANCED = {"moe_aux_loss_coeff": 0.1}

LAYOUTS = {
    "one process": (1, {}),
    "one process balanced": (1, BALANCED),
    "one expert a token, untied": (1, {"moe_router_topk": 1, **UNTIED, **BALANCED}),
    "dp2": (2, {}),
    "tp2 sequence parallel": (2, SEQUENCE),
    "tp2 sequence parallel alltoall balanced": (2, {**SEQUENCE, **ALL_TO_ALL, **BALANCED}),
    "ep2": (2, EP2),
    "ep2 alltoall balanced": (2, {**EP2, **ALL_TO_ALL, **BALANCED}),
    "ep2 distributed": (2, {**EP2, **DISTRIBUTED}),
    "ep2 distributed alltoall": (2, {**EP2, **DISTRIBUTED, **ALL_TO_ALL}),
    "ep2 dp4 distributed overlap": (4, {**EP2, **OVERLAP}),
    "pp2": (2, PP2),
    "pp2 balanced own": (2, {**PP2, **BALANCED, **OWN}),
    "pp2 chunks2 untied": (2, {**PP2, **CHUNKS, **UNTIED}),
    "pp2 ep2": (4, {**PP2, **EP2}),
    "pp2 ep2 distributed alltoall balanced": (
        4,
        {**PP2, **EP2, **DISTRIBUTED, **ALL_TO_ALL, **BALANCED},
    ),
    "tp2 ep2 sequence parallel": (4, {**SEQUENCE, **EP2}),
    "tp2 ep2 sequence parallel distributed balanced": (
        4,
        {**SEQUENCE, **EP2, **DISTRIBUTED, **BALANCED},
    ),
}
RESUMED = {
    "one process": (1, {}),
    "ep2": (2, EP2),
    "ep2 distributed": (2, {**EP2, **DISTRIBUTED}),
    "pp2 ep2 distributed": (4, {**PP2, **EP2, **DISTRIBUTED}),
}
# name: (processes, settings) before, (processes, settings) after
OTHER_LAYOUT = {
    "ep2 -> one process": ((2, EP2), (1, {})),
    "tp2 -> ep2": ((2, SEQUENCE), (2, EP2)),
    "ep2 -> pp2": ((2, EP2), (2, PP2)),
    "ep2 distributed -> one process distributed": ((2, {**EP2, **DISTRIBUTED}), (1, DISTRIBUTED)),
    "tp2 distributed -> ep2 distributed": (
        (2, {**SEQUENCE, **DISTRIBUTED}),
        (2, {**EP2, **DISTRIBUTED}),
    ),
}


def steps_in(layout: tuple[int, dict], *arguments) -> list[dict]:
    """Return the ranks' reports of ``steps_from`` in a layout."""
    world_size, changes = layout
    return run_ranks(world_size, steps_from, tiny(**{**EXPERTS, **changes}), *arguments)


if can_route_without_transformer_engine():

    @pytest.mark.parametrize("name", LAYOUTS)
    def test_layout_with_experts_equals_reference(name):
        world_size, changes = LAYOUTS[name]
        compare(world_size, tiny(**{**EXPERTS, **changes}), 1e-5)

    @pytest.mark.parametrize("name", RESUMED)
    def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(name, tmp_path):
        layout, root = RESUMED[name], str(tmp_path)
        whole = steps_in(layout, root, False, 0, 4, False)
        steps_in(layout, root, False, 0, 2, True)
        rest = steps_in(layout, root, True, 2, 4, False)
        assert rest[0]["losses"] == whole[0]["losses"][2:]
        assert_same_state(rest, whole)

    @pytest.mark.parametrize("name", OTHER_LAYOUT)
    def test_a_checkpoint_continues_in_another_layout(name, tmp_path):
        (before, after), root = OTHER_LAYOUT[name], str(tmp_path)
        saved = steps_in(before, root, False, 0, 3, True)
        loaded = steps_in(after, root, True, 3, 5, False)
        assert_same_state(loaded, saved, loaded=True)
        never_stopped = steps_in(before, root, False, 0, 5, False)
        for (got, *_), (expected, *_) in zip(
            loaded[0]["losses"], never_stopped[0]["losses"][3:], strict=True
        ):
            assert got == pytest.approx(expected, rel=1e-5)

    def test_a_checkpoint_names_the_norm_before_experts_as_transformer_engines_layers_do(tmp_path):
        steps_in((1, {}), str(tmp_path), False, 0, 0, True)
        names = FileSystemReader(tmp_path / "iter_0000000").read_metadata().state_dict_metadata
        assert "decoder.layers.pre_mlp_layernorm.weight" in names
        assert not any("linear_fc1.layer_norm" in name for name in names)

else:

    def test_experts_are_refused_by_name():
        with pytest.raises(PlatformError, match="--num-experts: 4 needs Transformer Engine"):
            check_platform(tiny(**EXPERTS), CpuPlatform())
