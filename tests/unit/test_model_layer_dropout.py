"""LayerSkip's dropped layers: chances, draws and hooks."""

import math

import pytest
import torch

from megatron_sorted.model.layer_dropout import LayerDropout, drop_chance, is_dropped
from megatron_sorted.platform.cpu import CpuPlatform
from tests.support.tiny import tiny


class Doubles(torch.nn.Module):
    """A stand-in for Megatron's layer: takes keyword arguments, returns hidden state and None."""

    def forward(self, hidden_states):
        return 2 * hidden_states, None


def test_the_probability_grows_from_zero_at_the_first_layer_to_p_max_at_the_last():
    settings = tiny(num_layers=5, layer_dropout=0.2)
    assert [drop_chance(settings, layer, 7) for layer in range(5)] == pytest.approx(
        [0, 0.2 * (2**0.25 - 1), 0.2 * (2**0.5 - 1), 0.2 * (2**0.75 - 1), 0.2]
    )


def test_the_probability_grows_over_time_where_requested():
    settings = tiny(
        num_layers=3, layer_dropout=0.2, layer_dropout_schedule="exponential", train_iters=11
    )
    assert [drop_chance(settings, 2, step) for step in (0, 5, 10, 99)] == pytest.approx(
        [0, 0.2 * (math.sqrt(2) - 1), 0.2, 0.2]
    )


def test_draws_are_as_frequent_as_they_should_be_and_depend_on_all_four():
    settings = tiny(layer_dropout=0.3)
    drawn = [is_dropped(settings, 3, step, sample) for step in range(200) for sample in range(50)]
    assert abs(sum(drawn) / len(drawn) - 0.3) < 4.5 * (0.3 * 0.7 / len(drawn)) ** 0.5
    table = [
        tuple(
            is_dropped(tiny(layer_dropout=0.9, seed=seed), layer, step, sample)
            for sample in range(first, first + 40)
        )
        for seed, layer, step, first in (
            (1, 3, 1, 0),
            (2, 3, 1, 0),
            (1, 2, 1, 0),
            (1, 3, 2, 0),
            (1, 3, 1, 40),
        )
    ]
    assert len(set(table)) == len(table)


def test_a_dropped_sample_and_its_gradient_pass_unchanged():
    settings = tiny(layer_dropout=0.5)
    layer = Doubles()
    dropout = LayerDropout([layer], 3, settings)
    samples = list(range(16))
    dropout.draw(4, samples, CpuPlatform())
    dropped = torch.tensor([is_dropped(settings, 3, 4, sample) for sample in samples])
    assert 0 < dropped.sum() < 16
    hidden = torch.randn(5, 16, 2, requires_grad=True)
    out, rest = layer(hidden_states=hidden)
    assert rest is None and torch.equal(
        out, torch.where(dropped[None, :, None], hidden, 2 * hidden)
    )
    out.sum().backward()
    assert torch.equal(hidden.grad, torch.where(dropped, 1.0, 2.0)[None, :, None].expand(5, 16, 2))
    layer.eval()
    assert torch.equal(layer(hidden_states=hidden)[0], 2 * hidden)


def test_the_first_layer_is_never_dropped():
    layer = Doubles()
    dropout = LayerDropout([layer], 0, tiny(layer_dropout=0.9))
    dropout.draw(0, range(50), CpuPlatform())
    assert dropout.kept == {}
