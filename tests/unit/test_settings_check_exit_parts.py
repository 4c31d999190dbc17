"""Parts of exits and --tune-exit: what fits together, and what is refused with a remedy."""

from dataclasses import replace

import pytest

from megatron_sorted.errors import SettingsError
from megatron_sorted.settings.rules import check_settings
from megatron_sorted.settings.run import Settings

BASE = replace(Settings(), mock_data=True, vocab_size=100, exit_layer_nums=(2, 4))
TUNE = {"tune_exit": True, "use_exit_norm": True}
DRAWN = {"exit_sampling": "probabilities", "exit_probabilities": (0.25, 0.75, 0.0)}
WARM = {"exit_layer_weight_warmup_iters": 5}

ALLOWED = [
    {"use_exit_block": True, "exit_adapter_rank": 4},
    {"use_exit_mlp": True, "exit_adapter_rank": 256},
    {"tune_exit": True, "use_exit_block": True},
    {"tune_exit": True, "use_exit_mlp": True},
    {"tune_exit": True, "exit_adapter_rank": 1},
    {"tune_exit": True, "untie_exit_output_weights": True},
    TUNE,
    {**TUNE, **DRAWN},
    {**TUNE, "exit_layer_weight": (0.5, 1.0)},
    {**TUNE, "exit_layer_weight": (0.5, 1.0, 0.0)},
    {**TUNE, **WARM, "exit_layer_weight_init": (0.0, 0.1)},
    {**TUNE, "exit_layer_nums": (2, 4, 8), "exit_layer_weight": (0.5, 1.0)},
    {**TUNE, "exit_sampling": "uniform", "num_sampled_exits": 2},
    {"exit_adapter_rank": 4, "num_experts": 2},
]
REFUSED = [
    (
        {"use_exit_block": True, "exit_layer_nums": ()},
        "--use-exit-block: there is no intermediate exit .* --exit-layer-nums",
    ),
    (
        {"use_exit_mlp": True, "exit_layer_nums": (8,)},
        "--use-exit-mlp: there is no intermediate exit",
    ),
    (
        {"exit_adapter_rank": 1, "exit_layer_nums": ()},
        "--exit-adapter-rank: there is no intermediate exit",
    ),
    ({"use_exit_block": True, "use_exit_mlp": True}, "a block has an MLP of its own. Give one"),
    ({"exit_adapter_rank": 257}, "--exit-adapter-rank: 257 is above --hidden-size 256.* Lower it"),
    ({"exit_adapter_rank": -1}, "--exit-adapter-rank: -1 is negative"),
    ({"use_exit_block": True, "num_experts": 2}, "not supported with experts .--num-experts 2"),
    ({"tune_exit": True}, "--tune-exit: there is nothing to tune. .*--use-exit-block"),
    ({**TUNE, "exit_layer_nums": ()}, "--tune-exit: there is nothing to tune"),
    (
        {**TUNE, "exit_layer_weight": (0.5, 1.0, 0.25)},
        "--exit-layer-weight: 0.25 for the last exit, which --tune-exit freezes.* Leave",
    ),
    (
        {**TUNE, "exit_layer_nums": (8, 2), "exit_layer_weight": (0.5, 1.0)},
        "--exit-layer-weight: 0.5 for the last exit",
    ),
    (
        {**TUNE, **WARM, "exit_layer_weight_init": (0.5, 1.0, 1.0)},
        "--exit-layer-weight-init: 1 for the last exit",
    ),
    (
        {**TUNE, **DRAWN, "exit_probabilities": (0.5, 0.25, 0.25)},
        "--exit-probabilities: 0.25 for the last exit.* Give it 0",
    ),
    (
        {**TUNE, "exit_layer_weight": (0.0, 0.0)},
        "--exit-layer-weight: every intermediate exit counts 0 at step 0",
    ),
    ({**TUNE, **WARM}, "--exit-layer-weight-init: every intermediate exit counts 0 at step 0"),
    (
        {**TUNE, "exit_sampling": "uniform", "num_sampled_exits": 3},
        "--num-sampled-exits: 3 of 2 exits",
    ),
]


@pytest.mark.parametrize("changes", ALLOWED)
def test_what_fits_is_allowed(changes):
    check_settings(replace(BASE, **changes), 1)


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(SettingsError, match=message):
        check_settings(replace(BASE, **changes), 1)
