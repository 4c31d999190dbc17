"""Rules between the rule of coefficients, its constants, guard and curriculum."""

from dataclasses import replace

import pytest

from megatron_sorted.errors import SettingsError
from megatron_sorted.exits.curriculum import Curriculum
from megatron_sorted.exits.guard import Guard
from megatron_sorted.settings.coefficient_rule import LEARNED, coefficient_rule
from megatron_sorted.settings.load import load_settings
from megatron_sorted.settings.rules import check_settings
from megatron_sorted.settings.run import Settings

BASE = replace(Settings(), mock_data=True, vocab_size=100, exit_layer_nums=(2, 4))
REFERENCES = {"exit_reference_loss": (3.0, 2.5, 2.0)}
EXCESS = {"exit_layer_weight_rule": "excess_loss"}
LAST_AT_ZERO = {
    "exit_layer_weight_warmup_iters": 5,
    "exit_layer_weight": (1.0, 1.0, 1.0),
    "exit_layer_weight_init": (1.0, 1.0, 0.0),
}
GUARD = {"exit_guard": True, "exit_guard_loss": 2.0}


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {"exit_layer_weight_rule": rule, **(REFERENCES if rule == "excess_loss" else {})}
            for rule in LEARNED
        ),
        {**EXCESS, **REFERENCES, "exit_excess_rate": 2.0},
        {"exit_layer_weight_rule": "layerskip", "exit_layer_weight_scale": 0.2},
        GUARD,
        {"exit_guard": True, **REFERENCES},
        {**GUARD, "exit_layer_weight": (0.1, 0.1), "exit_guard_margin": 0.1},
        {"exit_curriculum": "rotation", "exit_curriculum_interval": 2},
        {"exit_curriculum": "gradual", "exit_curriculum_fraction": 1.0, **GUARD},
        {
            "exit_sampling": "coefficients",
            "num_sampled_exits": 2,
            "exit_layer_weight_rule": "gradnorm",
        },
        {"exit_curriculum": "rotation", "exit_sampling": "uniform"},
        {
            "layer_dropout": 0.1,
            "layer_dropout_schedule": "exponential",
            "recompute_granularity": "selective",
        },
    ],
)
def test_a_run_within_the_rules_passes(changes):
    check_settings(replace(BASE, **changes), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {**EXCESS},
            "--exit-reference-loss: 0 values for 3 exits (depths 2, 4, 8; depth 2 has none)",
        ),
        (
            {**EXCESS, "exit_reference_loss": (3.0, 2.5)},
            "--exit-reference-loss: 2 values for 3 exits (depths 2, 4, 8; depth 8 has none)",
        ),
        (
            {**EXCESS, "exit_reference_loss": (3.0, 2.5, 2.0, 1.0)},
            "--exit-reference-loss: 4 values for 3 exits (depths 2, 4, 8). Give one",
        ),
        (
            {**EXCESS, "exit_reference_loss": (3.0, -2.5, 2.0)},
            "--exit-reference-loss: -2.5 of depth 4 is negative",
        ),
        (REFERENCES, "--exit-reference-loss: nothing uses it"),
        ({"exit_guard": True}, "--exit-guard: there is no reference loss"),
        ({"exit_guard_loss": 2.0}, "--exit-guard-loss: 2.0 has no effect without --exit-guard"),
        ({"exit_guard_rate": 0.5}, "--exit-guard-rate: 0.5 has no effect without --exit-guard"),
        ({**GUARD, **LAST_AT_ZERO}, "--exit-guard: the last exit counts 0 at step 0"),
        (
            {"exit_layer_weight_rule": "dwa", "exit_layer_weight": (0.1, 0.2)},
            "--exit-layer-weight: a list together with --exit-layer-weight-rule dwa",
        ),
        (
            {"exit_layer_weight_rule": "dwa", "exit_layer_weight_warmup_iters": 5},
            "dwa sets the coefficients from the first step on",
        ),
        (
            {"exit_dwa_window": 5},
            "--exit-dwa-window: 5 has no effect with --exit-layer-weight-rule uniform. Use dwa",
        ),
        (
            {"exit_layer_weight_scale": 0.5},
            "--exit-layer-weight-scale: 0.5 has no effect with --exit-layer-weight-rule uniform",
        ),
        (
            {"exit_layer_weight_rule": "simulated_exit", "exit_simulated_thresholds": 256},
            "--exit-simulated-thresholds: 256 is above 255",
        ),
        (
            {"exit_curriculum_interval": 2},
            "--exit-curriculum-interval: 2 has no effect with --exit-curriculum none. Use rotation",
        ),
        (
            {"exit_curriculum": "rotation", "exit_curriculum_fraction": 0.3},
            "--exit-curriculum-fraction: 0.3 has no effect",
        ),
        (
            {"exit_curriculum": "gradual", "exit_curriculum_fraction": 1.5},
            "--exit-curriculum-fraction: 1.5 is above 1",
        ),
        (
            {"exit_curriculum": "gradual", **LAST_AT_ZERO},
            "--exit-curriculum gradual: the last exit counts 0",
        ),
        (
            {
                "exit_curriculum": "rotation",
                "exit_sampling": "probabilities",
                "exit_probabilities": (0.5, 0.5, 0.0),
            },
            "--exit-curriculum rotation: with --exit-sampling probabilities",
        ),
        ({"exit_sampling": "coefficients", "num_sampled_exits": 4}, "--num-sampled-exits: 4 of 3"),
        (
            {"exit_sampling": "coefficients", "exit_probabilities": (0.5, 0.25, 0.25)},
            "--exit-probabilities: not used with",
        ),
        (
            {"layer_dropout": 0.1, "recompute_granularity": "full"},
            "--layer-dropout: 0.1 with --recompute-granularity full",
        ),
        (
            {"layer_dropout": 0.1, "num_layers": 1, "exit_layer_nums": ()},
            "--layer-dropout: 0.1 in a network of one layer",
        ),
        (
            {"layer_dropout_schedule": "exponential"},
            "--layer-dropout-schedule: exponential has no effect without --layer-dropout",
        ),
        ({"layer_dropout": 1.0}, "--layer-dropout: 1.0 is not in [0, 1)"),
    ],
)
def test_a_run_outside_a_rule_is_refused(changes, message):
    with pytest.raises(SettingsError) as error:
        check_settings(replace(BASE, **changes), 1)
    assert message in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("name", "nearest_name"),
    [
        ("uncertanty", "uncertainty"),
        ("grad-norm", "gradnorm"),
        ("layer_skip", "layerskip"),
        ("simulated-exit", "simulated_exit"),
        ("excess", "excess_loss"),
        ("invers", "inverse"),
    ],
)
def test_an_unknown_rule_names_the_nearest(name, nearest_name):
    with pytest.raises(SettingsError) as error:
        load_settings(["--exit-layer-weight-rule", name])
    message = (
        f"--exit-layer-weight-rule: {name!r} is not a value of this setting. Did you mean "
        f"{nearest_name}? Give one of uniform,"
    )
    assert message in str(error.value)
    with pytest.raises(SettingsError, match=r"'zzzz' is not a value of this setting\. Give one of"):
        load_settings(["--exit-layer-weight-rule", "zzzz"])


def test_guard_wraps_curriculum_wraps_rule():
    rule = coefficient_rule(
        replace(
            BASE,
            **EXCESS,
            **REFERENCES,
            exit_guard=True,
            exit_guard_margin=0.25,
            exit_curriculum="rotation",
        )
    )
    assert isinstance(rule, Guard) and rule.reference == 2.25
    assert isinstance(rule.rule, Curriculum) and type(rule.rule.rule) is type(
        LEARNED["excess_loss"](replace(BASE, **REFERENCES))
    )
    assert rule.rule.rule.references == {2: 3.0, 4: 2.5, 8: 2.0}
    assert rule.coefficients(0) == pytest.approx({2: 0.5, 4: 0.0, 8: 0.5})
    assert rule.coefficients(1) == pytest.approx({2: 0.0, 4: 0.5, 8: 0.5})
