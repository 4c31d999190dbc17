import pytest

from megatron_sorted.conversion.hugging_face.exit_keys import (
    exits_of_config,
    keys_of_exits,
    without_exits,
)
from megatron_sorted.errors import CheckpointError

CONFIG = {"num_hidden_layers": 4, "hidden_size": 32}


@pytest.mark.parametrize(
    ("parts", "settings"),
    [
        ((), {"use_exit_block": False, "use_exit_mlp": False, "exit_adapter_rank": 0}),
        ((True, False, 0), {"use_exit_block": True, "use_exit_mlp": False, "exit_adapter_rank": 0}),
        ((False, True, 8), {"use_exit_block": False, "use_exit_mlp": True, "exit_adapter_rank": 8}),
    ],
)
def test_written_keys_are_read_back(parts, settings):
    keys = keys_of_exits((1, 3, 4), True, False, *parts)
    assert exits_of_config({**CONFIG, **keys}, "config.json") == {
        "exit_layer_nums": (1, 3, 4),
        "use_exit_norm": True,
        "untie_exit_output_weights": False,
        **settings,
    }
    assert set(keys) - {"exit_layer_indices", "tie_exit_lm_head", "own_exit_norms"} == {
        key
        for key, value in zip(
            ("exit_block", "exit_mlp", "exit_adapter_rank"), (*parts, 0, 0, 0)[:3], strict=True
        )
        if value
    }
    assert without_exits({**CONFIG, **keys}) == CONFIG


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"exit_block": 1}, "exit_block is 1; only true and false"),
        ({"exit_mlp": None}, "exit_mlp is None; only true and false"),
        ({"exit_adapter_rank": -1}, "exit_adapter_rank is -1; only 0"),
        ({"exit_adapter_rank": True}, "exit_adapter_rank is True; only 0"),
        ({"exit_adapter_rank": 2.0}, r"exit_adapter_rank is 2\.0; only 0"),
        (
            {"exit_adapter_rank": 33},
            r"exit_adapter_rank is 33; only 0 \(none\) to the hidden size \(32\)",
        ),
        ({"exit_block": True, "exit_mlp": True}, "declares exit_block and exit_mlp"),
        ({"exit_block": True, "exit_layer_indices": None}, "has no exit_layer_indices"),
        ({"exit_adapter_rank": 2, "exit_layer_indices": [4]}, "holds the last layer alone"),
    ],
)
def test_contradictory_and_unknown_keys_are_refused(keys, message):
    with pytest.raises(CheckpointError, match=message):
        exits_of_config({**CONFIG, "exit_layer_indices": [1, 4], **keys}, "config.json")
