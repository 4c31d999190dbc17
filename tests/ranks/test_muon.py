"""Muon: in every layout it equals plain PyTorch, and a resumed run the uninterrupted one."""

import pytest
import torch

from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.muon import check_muon_is_there
from tests.ranks.test_layouts import compare
from tests.ranks.test_weight_average import check_average
from tests.support.gather import join_ranks
from tests.support.layouts import CHUNKS, OWN, PP2, SEQUENCE, TP2, UNTIED
from tests.support.muon_reference import MuonAndAdam
from tests.support.rank_bodies import parameters_of_parts, steps_from
from tests.support.ranks import run_ranks
from tests.support.same_state import assert_equal, assert_same_state, joined
from tests.support.tiny import tiny


def has_muon() -> bool:
    """Return whether this environment has all that Muon needs."""
    try:
        check_muon_is_there()
    except PlatformError:
        return False
    return True


pytestmark = pytest.mark.skipif(
    not has_muon(),
    reason="no Muon in this environment: tests/system/test_muon.py makes one that has it",
)
MUON = {"optimizer": "muon", "muon_fp32_matmul_prec": "highest", "muon_extra_scale_factor": 0.2}
PLAIN = {"muon_nesterov": True, "muon_split_qkv": False, "muon_coefficient_type": "simple"}
BF16 = {"bf16": True}
# nothing trains on the first stage of two
FROZEN = {"tune_exit": True, "exit_layer_nums": (3,), "use_exit_block": True, **OWN}
LAYOUTS = {
    "one process": (1, {}),
    "one process, other options": (1, {**OWN, **PLAIN, "muon_scale_mode": "shape_scaling"}),
    "polar express": (
        1,
        {
            "muon_coefficient_type": "polar_express",
            "muon_num_ns_steps": 8,
            "muon_scale_mode": "unit_rms_norm",
        },
    ),
    "tp2": (2, TP2),
    "tp2 sequence parallel distributed own": (
        2,
        {**SEQUENCE, **OWN, **UNTIED, "muon_tp_mode": "distributed"},
    ),
    "tp2 blockwise": (2, {**TP2, "muon_tp_mode": "blockwise"}),
    "dp2 overlap": (2, {"overlap_grad_reduce": True}),
    "pp2": (2, PP2),
    "pp2 untied": (2, {**PP2, **UNTIED}),
    "pp2 own": (2, {**PP2, **OWN}),
    "pp2 chunks2": (2, {**PP2, **CHUNKS}),
    "pp2 blocks and adapters": (2, {**PP2, "use_exit_block": True, "exit_adapter_rank": 4}),
    "pp2 frozen base": (2, {**PP2, **FROZEN}),
    "tp2 pp2": (4, {**TP2, **PP2, **UNTIED}),
    "pp2 dp2": (4, PP2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_plain_pytorch(name):
    world_size, changes = LAYOUTS[name]
    reports = compare(world_size, tiny(**MUON, **changes), 1e-4, make_optimizer=MuonAndAdam)
    _, copies = join_ranks([report["weights"] for report in reports])
    for tensor, held in copies.items():
        assert all(torch.equal(held[0], other) for other in held[1:]), f"copies of {tensor} differ"


def test_products_in_bf16_which_are_the_default_are_near_plain_pytorch():
    settings = tiny(**{**MUON, "muon_fp32_matmul_prec": "medium"})
    compare(1, settings, 2e-2, make_optimizer=MuonAndAdam)
    with pytest.raises(AssertionError, match="weight decoder"):
        compare(1, settings, 1e-4, make_optimizer=MuonAndAdam)


def assert_same_momentum(got: list[dict], expected: list[dict], loaded: bool = False) -> None:
    """Check that Muon's momentum is the same; with ``loaded``, right after loading."""
    key = "loaded_moments" if loaded else "moments"
    assert_equal(
        joined(got, key, "momentum_buffer"),
        joined(expected, "moments", "momentum_buffer"),
        "momentum_buffer",
    )


RESUMED = {
    "one process": (1, {}),
    "tp2 own": (2, {**TP2, **OWN}),
    "bf16 pp2": (2, {**PP2, **BF16}),
    "bf16 pp2 frozen base": (2, {**PP2, **BF16, **FROZEN}),
    "dp2 untied": (2, UNTIED),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(name, tmp_path):
    world_size, changes = RESUMED[name]
    settings = tiny(**MUON, **changes, lr_decay_style="cosine")
    whole = run_ranks(world_size, steps_from, settings, str(tmp_path), False, 0, 4, False)
    run_ranks(world_size, steps_from, settings, str(tmp_path), False, 0, 2, True)
    # a second save and load: what the first load brought must not get in the way
    run_ranks(world_size, steps_from, settings, str(tmp_path), True, 2, 3, True)
    rest = run_ranks(world_size, steps_from, settings, str(tmp_path), True, 3, 4, False)
    assert rest[0]["losses"] == whole[0]["losses"][3:]
    assert_same_state(rest, whole)
    assert_same_momentum(rest, whole)


OTHER_LAYOUT = {
    "tp2 -> pp2 chunks2": ((2, TP2), (2, {**PP2, **CHUNKS})),
    "bf16 pp2 own -> bf16 tp2 own": ((2, {**PP2, **OWN, **BF16}), (2, {**TP2, **OWN, **BF16})),
}


@pytest.mark.parametrize("name", OTHER_LAYOUT)
def test_another_layout_continues_a_checkpoint(name, tmp_path):
    (world_before, before), (world_after, after) = OTHER_LAYOUT[name]
    before, after = tiny(**MUON, **before), tiny(**MUON, **after)
    saved = run_ranks(world_before, steps_from, before, str(tmp_path), False, 0, 2, True)
    loaded = run_ranks(world_after, steps_from, after, str(tmp_path), True, 2, 4, False)
    assert_same_state(loaded, saved, loaded=True)
    assert_same_momentum(loaded, saved, loaded=True)
    never_stopped = run_ranks(world_before, steps_from, before, str(tmp_path), False, 0, 4, False)
    pairs = zip(loaded[0]["losses"], never_stopped[0]["losses"][2:], strict=True)
    for (got, *_), (expected, *_) in pairs:
        assert got == pytest.approx(expected, rel=2e-3 if before.bf16 else 1e-5)


def test_an_average_of_weights_is_the_mean_of_the_steps(tmp_path):
    check_average(2, {**MUON, **PP2, **OWN, **BF16}, str(tmp_path))


def test_muon_takes_the_matrices_of_layers_and_parts_and_adam_the_rest():
    settings = tiny(
        **MUON,
        **PP2,
        **OWN,
        **UNTIED,
        position_embedding_type="learned_absolute",
        use_exit_block=True,
        disable_bias_linear=False,
    )
    of_muon, of_adam = set(), set()
    for parts in run_ranks(2, parameters_of_parts, settings):
        of_muon |= parts["TensorParallelMuon"]
        of_adam |= parts["AdamW"]
    layers = [f"decoder.layers.{number}" for number in range(4)]
    blocks = [f"exit_blocks.{depth}" for depth in (1, 2, 3)]
    attention, mlp = ("linear_qkv", "linear_proj"), ("linear_fc1", "linear_fc2")
    matrices = (*(f"self_attention.{m}" for m in attention), *(f"mlp.{m}" for m in mlp))
    assert of_muon == {f"{a}.{b}.weight" for a in (*layers, *blocks) for b in matrices}
    outputs = {"output_layer.weight", *(f"exit_output_layers.{d}.weight" for d in (1, 2, 3))}
    lookups = {"embedding.word_embeddings.weight", "embedding.position_embeddings.weight"}
    assert outputs | lookups < of_adam and not of_adam & of_muon
    assert f"{layers[0]}.mlp.linear_fc1.bias" in of_adam
