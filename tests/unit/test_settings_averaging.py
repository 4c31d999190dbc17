"""Which steps are averaged and how much each counts, and the rules: just within, just outside."""

from dataclasses import replace

import pytest

from megatron_sorted.errors import SettingsError
from megatron_sorted.settings.averaging import (
    Averaging,
    averaging_hints,
    averaging_of,
    holds_averages,
    saved_averaging,
)
from megatron_sorted.settings.load import settings_as_dict
from megatron_sorted.settings.rules import check_settings
from megatron_sorted.settings.run import Settings

BASE = replace(
    Settings(),
    mock_data=True,
    vocab_size=100,
    train_iters=100,
    average_weights_from=0.5,
    lr_decay_style="constant",
)
EXITS = {"exit_layer_nums": (2,), "use_exit_norm": True, "exit_adapter_rank": 4}
EXPORT = {"save": "run", "save_hf": "model"}
OFF = {"average_weights_from": None}
ALLOWED = [
    {},
    {"average_weights_from": 0.0},
    {"average_weights_from": 0.99},
    {"average_every": 50},
    {"average_weights_decay": 0.999},
    {"average_weights_decay": 1e-3},
    {"evaluate_averaged": True},
    {**EXITS, "tune_exit": True},
    EXITS,
    {**EXPORT, "save_hf_weights": "both"},
    {**OFF, **EXPORT},
    {**OFF, "skip_train": True, "load": "run", "evaluate_averaged": True},
    {"skip_train": True, "load": "run", "train_iters": 0},
    {"lora_rank": 4, **OFF},
    {"num_experts": 4, "moe_ffn_hidden_size": 8},
]
REFUSED = [
    ({"average_weights_from": 1.0}, "--average-weights-from: 1.0 is not below 1, so averaging"),
    ({"average_weights_from": -0.1}, "--average-weights-from: -0.1 is negative"),
    (
        {"average_weights_from": 0.999},
        "--average-every: 1 is more than the 0 steps that are left of --train-iters 100 after "
        "--average-weights-from 0.999, so no weights would be averaged",
    ),
    ({"average_every": 51}, "--average-every: 51 is more than the 50 steps that are left"),
    ({"average_every": 0}, "--average-every: 0 is not above 0"),
    ({"average_weights_decay": 1.0}, "--average-weights-decay: 1.0 is not below 1"),
    ({"average_weights_decay": 0.0}, "--average-weights-decay: 0.0 is not above 0"),
    ({"lora_rank": 4}, "--average-weights-from: 0.5 with --lora-rank 4: the mean of the factors"),
    (
        {**OFF, "average_weights_decay": 0.9},
        "--average-weights-decay: 0.9 without --average-weights-from",
    ),
    ({**OFF, "average_every": 2}, "--average-every: 2 without --average-weights-from"),
    ({**OFF, "evaluate_averaged": True}, "--evaluate-averaged: True without --average-weights"),
    (
        {**OFF, **EXPORT, "save_hf_weights": "averaged"},
        "--save-hf-weights: averaged without --average-weights-from",
    ),
    ({"save_hf_weights": "both"}, "--save-hf-weights: both without --save-hf"),
]


@pytest.mark.parametrize("changes", ALLOWED)
def test_a_run_within_the_rules_passes(changes):
    check_settings(replace(BASE, **changes), 1)


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_a_run_outside_a_rule_is_refused(changes, message):
    with pytest.raises(SettingsError) as refusal:
        check_settings(replace(BASE, **changes), 1)
    assert message in str(refusal.value)


@pytest.mark.parametrize(("start", "every"), [(0, 1), (50, 10), (7, 3), (99, 1)])
def test_counts_and_shares_make_the_mean_of_the_averaged_steps(start, every):
    averaging = Averaging(start, every)
    averaged = [step for step in range(1, 101) if step > start and (step - start) % every == 0]
    assert [step for step in range(1, 101) if averaging.includes(step)] == averaged
    for step in range(101):
        assert averaging.count(step) == sum(one <= step for one in averaged)
    mean = float("inf")  # what was there before does not matter
    for count, step in enumerate(averaged, 1):
        share = averaging.share(step)
        mean = float(step) if share == 1 else mean + share * (step - mean)
        assert mean == pytest.approx(sum(averaged[:count]) / count, rel=1e-12)


def test_an_exponential_average_keeps_its_decay_after_the_first_step():
    averaging = Averaging(start=4, every=2, decay=0.75)
    assert [averaging.share(step) for step in (6, 8, 10)] == [1.0, 0.25, 0.25]


def test_a_checkpoint_holds_averages_from_the_first_averaged_step_on():
    settings = settings_as_dict(replace(BASE, average_every=10))
    assert saved_averaging(settings) == averaging_of(replace(BASE, average_every=10))
    held = [
        holds_averages({"settings": settings, "progress": {"step": step}}) for step in (59, 60, 100)
    ]
    assert held == [False, True, True]
    older = {name: value for name, value in settings.items() if "average" not in name}
    assert not holds_averages({"settings": older, "progress": {"step": 100}})


def test_hints_name_the_steps_and_a_schedule_that_decays():
    assert averaging_hints(replace(BASE, average_every=20)) == (
        "keeping the mean of the weights of 2 steps: 70 to 90, every 20",
    )
    decaying = averaging_hints(
        replace(BASE, lr_decay_style="cosine", lr_warmup_iters=60, average_weights_decay=0.9)
    )
    assert decaying[0].startswith("keeping an average of decay 0.9 of the weights of 50 steps")
    assert "--lr-decay-style cosine lowers the learning rate" in decaying[1]
    assert "starts at step 50, within --lr-warmup-iters 60" in decaying[2]
    assert averaging_hints(replace(BASE, average_weights_from=None)) == ()
