"""Rules between reports, wandb and TensorBoard: one run just within, one just outside."""

from dataclasses import replace

import pytest

from megatron_sorted.errors import SettingsError
from megatron_sorted.settings import monitoring as rules
from megatron_sorted.settings.rules import check_settings
from megatron_sorted.settings.run import Settings

BASE = replace(Settings(), mock_data=True, vocab_size=100)


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({"wandb_project": "p" * 128}, 1),
        (
            {
                "wandb_project": "nested 7B",
                "wandb_exp_name": "a",
                "wandb_entity": "b",
                "wandb_group": "c",
                "wandb_save_dir": "d",
            },
            1,
        ),
        ({"wandb_mode": "disabled"}, 1),
        ({"tensorboard_dir": "tb"}, 1),
    ],
)
def test_a_run_within_the_rules_passes(changes, world_size):
    check_settings(replace(BASE, **changes), world_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wandb_project": ""}, "--wandb-project: '' cannot be a project's name"),
        ({"wandb_project": "p" * 129}, "Give 1 to 128 characters"),
        ({"wandb_project": "team/p"}, "--wandb-project: 'team/p' cannot be a project's name"),
        (
            {"wandb_exp_name": "a"},
            "--wandb-exp-name: without --wandb-project nothing goes to Weights & Biases",
        ),
        ({"wandb_entity": "a"}, "--wandb-entity: without"),
        ({"wandb_group": "a"}, "--wandb-group: without"),
        ({"wandb_save_dir": "a"}, "--wandb-save-dir: without"),
        ({"metrics_file": "/"}, "--metrics-file: / is a directory. Give a file"),
    ],
)
def test_a_run_outside_a_rule_is_refused(changes, message):
    with pytest.raises(SettingsError) as error:
        check_settings(replace(BASE, **changes), 1)
    assert message in str(error.value)


def test_tensorboard_must_be_installed(monkeypatch):
    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="pip install tensorboard"):
        check_settings(replace(BASE, tensorboard_dir="tb"), 1)
