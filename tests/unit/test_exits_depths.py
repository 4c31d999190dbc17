"""Depths, and lists of values beside them."""

import pytest

from megatron_sorted.errors import SettingsError
from megatron_sorted.exits.depths import by_depth, normalise_depths


@pytest.mark.parametrize(
    ("given", "num_layers", "depths"),
    [
        ((), 8, (8,)),
        ((2, 4), 8, (2, 4, 8)),
        ((4, 2), 8, (2, 4, 8)),
        ((2, 8), 8, (2, 8)),
        ((1,), 1, (1,)),
        ((1, 2, 3), 3, (1, 2, 3)),
    ],
)
def test_depths_rise_to_the_last_layer(given, num_layers, depths):
    assert normalise_depths(given, num_layers) == depths


@pytest.mark.parametrize("depth", [0, -1, 13, 14])
def test_a_depth_outside_the_network_is_refused(depth):
    with pytest.raises(SettingsError) as error:
        normalise_depths((2, depth), 12)
    assert (
        str(error.value)
        == f"--exit-layer-nums: {depth} is not a layer of this model (--num-layers 12). Use 1..12."
    )


def test_a_depth_listed_twice_is_refused():
    with pytest.raises(SettingsError, match="4 is listed more than once"):
        normalise_depths((4, 2, 4), 8)


@pytest.mark.parametrize(
    ("values", "given", "result"),
    [
        ((0.1, 0.2), (2, 4), {2: 0.1, 4: 0.2}),
        ((0.1, 0.2), (4, 2), {4: 0.1, 2: 0.2}),
        ((0.1, 0.2, 0.7), (2, 4), {2: 0.1, 4: 0.2, 8: 0.7}),
        ((0.7, 0.1), (8, 2), {8: 0.7, 2: 0.1}),
        ((0.1,), (8, 2), {2: 0.1}),
        ((), (), {}),
        ((3.0,), (), {8: 3.0}),
    ],
)
def test_values_stand_in_the_order_of_the_exits(values, given, result):
    assert by_depth("--x", values, given, 8) == result


@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_list_of_another_length_is_refused(count):
    with pytest.raises(
        SettingsError,
        match=rf"^--x: {count} values for 3 exits \(depths 2, 4, 8\). Give 2 .* or 3.$",
    ):
        by_depth("--x", (1.0,) * count, (2, 4), 8)
