"""Imported models of every family, in a run of several ranks, have transformers' logits."""

import pytest

from megatron_sorted.conversion.importing import import_model
from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.conversion.origins import RequestedExits
from tests.ranks.test_hugging_face_network import CASES, LAYOUTS, LENGTH, tokens
from tests.support.given_weights import join_logits, load_and_report
from tests.support.hugging_face import exit_logits, make_model
from tests.support.ranks import run_ranks
from tests.support.tiny import VOCABULARY, tiny


@pytest.mark.parametrize(
    "name",
    [
        "llama 1, all heads, untied",
        "llama, other numbers of the scaling, base 500000",
        "llama 2, positions interpolated",
        "mistral 0.1, sliding window",
        "qwen 2, biases, tied",
        "qwen 3, norms, wide heads, tied",
        "qwen 3, norms, untied",
    ],
)
def test_an_imported_model_continues_training_on_several_ranks(name, tmp_path):
    family, config, ours = CASES[name]
    model = make_model(family, **config)
    model.save_pretrained(tmp_path / "theirs")
    import_model(open_model(tmp_path / "theirs"), tmp_path / "imported", RequestedExits((1, 2, 3)))
    world_size, split = LAYOUTS["tp2 pp2"]
    # the shape in config.json must be that of these settings, or the run would refuse to load it
    settings = tiny(seq_length=LENGTH, lr=1e-7, **{**ours, **split})
    reports = run_ranks(world_size, load_and_report, settings, str(tmp_path / "imported"), tokens())
    got = join_logits(
        [(report["tensor rank"], set(), report["logits"]) for report in reports], VOCABULARY
    )
    expected = exit_logits(model, tokens())
    assert got.keys() == expected.keys() == {1, 2, 3, 4}
    for depth in expected:
        assert (got[depth] - expected[depth]).abs().max() < 1e-5, depth
