"""Rules of gradients at exits and of distillation: one run just within each, one just outside."""

from dataclasses import replace

import pytest

from megatron_sorted.errors import SettingsError
from megatron_sorted.settings.derived import deepest_layer_run
from megatron_sorted.settings.exit_distillation import check_top_k
from megatron_sorted.settings.rules import check_settings
from megatron_sorted.settings.run import Settings

BASE = replace(Settings(), mock_data=True, vocab_size=100, exit_layer_nums=(2, 4))
TAUGHT = {"exit_kd_weight": 0.5}
DRAWN = {"exit_sampling": "probabilities", "exit_probabilities": (0.5, 0.5, 0.0)}

ALLOWED = [
    {"exit_gradient_rule": "project", "exit_gradient_scope": "micro-batch"},
    {
        "exit_gradient_rule": "balance",
        "exit_gradient_scope": "micro-batch",
        "exit_gradient_balance": 0.1,
    },
    {"exit_gradient_rule": "equilibrium"},
    {"log_exit_gradients": True},
    TAUGHT,
    {"exit_kd_weight": 1.0, "exit_kd_temperature": 0.5, "exit_kd_top_k": 100},
    {**TAUGHT, "exit_kd_target": "choice", "exit_kd_teacher": "models/teacher"},
    {**TAUGHT, "exit_layer_weight": (0.0, 0.5)},
    {**TAUGHT, "exit_layer_weight": (0.5, 0.5, 0.0), "tune_exit": True, "use_exit_norm": True},
    {**TAUGHT, "exit_sampling": "uniform"},
    {
        **TAUGHT,
        "exit_curriculum": "gradual",
    },  # at first the last exit alone is on; the others learn from it later
    {"exit_gradient_rule": "project", "exit_curriculum": "gradual"},
]
REFUSED = [
    ({"exit_kd_weight": 1.5}, "--exit-kd-weight: 1.5 is not in [0, 1]"),
    ({"exit_kd_weight": -0.5}, "--exit-kd-weight: -0.5 is negative"),
    ({**TAUGHT, "exit_kd_temperature": 0.0}, "--exit-kd-temperature: 0.0 is not above 0"),
    ({**TAUGHT, "exit_kd_temperature": -1.0}, "--exit-kd-temperature: -1.0 is not above 0"),
    (
        {**TAUGHT, "exit_kd_top_k": 101},
        "--exit-kd-top-k: 101 is more than the vocabulary's 100 tokens",
    ),
    ({**TAUGHT, "exit_kd_top_k": 0}, "--exit-kd-top-k: 0 is not above 0"),
    ({"exit_kd_temperature": 2.0}, "no effect without distillation"),
    ({"exit_kd_top_k": 5}, "no effect without distillation"),
    ({"exit_kd_target": "choice"}, "no effect without distillation"),
    (
        {**TAUGHT, "exit_kd_target": "choice", "exit_kd_temperature": 2.0},
        "--exit-kd-temperature: 2.0 has no effect on --exit-kd-target choice",
    ),
    (
        {**TAUGHT, "exit_kd_target": "choice", "exit_kd_top_k": 1},
        "--exit-kd-top-k: 1 has no effect on --exit-kd-target choice",
    ),
    ({**TAUGHT, "exit_layer_nums": ()}, "--exit-kd-weight: 0.5, but no intermediate exit trains"),
    (
        {**TAUGHT, "exit_layer_weight": (0.0, 0.0)},
        "--exit-kd-weight: 0.5, but no intermediate exit trains",
    ),
    (
        {**TAUGHT, "exit_layer_weight": (0.5, 0.5, 0.0)},
        "the teacher, the last exit (depth 8), does not train",
    ),
    ({**TAUGHT, **DRAWN}, "the teacher, the last exit (depth 8), does not train"),
    (
        {"exit_gradient_rule": "project", "exit_layer_nums": ()},
        "--exit-gradient-rule: project, but fewer than two exits train",
    ),
    (
        {"exit_gradient_rule": "balance", "exit_layer_weight": (0.0, 0.0)},
        "--exit-gradient-rule: balance, but fewer than two exits train",
    ),
    (
        {"exit_gradient_rule": "equilibrium", "exit_gradient_scope": "micro-batch"},
        "--exit-gradient-scope: micro-batch has no effect",
    ),
    (
        {"exit_gradient_rule": "project", "exit_gradient_balance": 2.0},
        "--exit-gradient-balance: 2 has no effect",
    ),
    (
        {"exit_gradient_rule": "balance", "exit_gradient_balance": 0.0},
        "--exit-gradient-balance: 0.0 is not above 0",
    ),
]


@pytest.mark.parametrize("changes", ALLOWED)
def test_a_run_within_the_rules_passes(changes):
    check_settings(replace(BASE, **changes), 1)


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_a_run_outside_a_rule_is_refused(changes, message):
    with pytest.raises(SettingsError) as error:
        check_settings(replace(BASE, **changes), 1)
    assert message in str(error.value)
    assert str(error.value).endswith(".")


def test_the_vocabulary_of_a_tokenizer_is_checked_when_it_is_known():
    settings = replace(BASE, **TAUGHT, exit_kd_top_k=40)
    check_top_k(replace(settings, vocab_size=None))
    check_top_k(replace(settings, vocab_size=40))
    with pytest.raises(SettingsError, match="more than the vocabulary's 39 tokens"):
        check_top_k(replace(settings, vocab_size=39))


def test_where_exits_are_taught_all_layers_are_run():
    taught = replace(BASE, **TAUGHT)
    assert (
        deepest_layer_run(BASE, {2: 1.0}) == 2
        and deepest_layer_run(taught, {2: 1.0}) == 8
        and deepest_layer_run(taught, {8: 1.0}) == 8
    )
