"""What is opened in wandb: settings, and wandb's own environment variables over them."""

from dataclasses import replace
from pathlib import Path

from megatron_sorted.monitoring.wandb_writer import wandb_plan
from megatron_sorted.settings.run import Settings

SETTINGS = replace(Settings(), wandb_project="nested", save="runs/first")


def test_defaults():
    plan = wandb_plan(SETTINGS, "abc123", {"settings": {"lr": 1.0}}, {})
    assert (plan.mode, plan.directory) == (
        "online",
        Path("runs/first"),
    )  # wandb itself adds its directory `wandb`
    assert plan.init == {
        "id": "abc123",
        "project": "nested",
        "name": "first",
        "entity": None,
        "group": None,
        "resume": "allow",
        "dir": "runs/first",
        "config": {"settings": {"lr": 1.0}},
    }
    nowhere = wandb_plan(replace(SETTINGS, save=None), "abc123", {}, {})
    assert (nowhere.directory, nowhere.init["name"]) == (Path("."), None)


def test_settings():
    settings = replace(
        SETTINGS,
        wandb_exp_name="a",
        wandb_entity="b",
        wandb_group="c",
        wandb_save_dir="d",
        wandb_mode="offline",
    )
    plan = wandb_plan(settings, "abc123", {}, {"WANDB_MODE": ""})
    assert (plan.mode, plan.directory) == ("offline", Path("d"))
    assert [plan.init[key] for key in ("name", "entity", "group", "dir")] == ["a", "b", "c", "d"]


def test_environment():
    environment = {
        "WANDB_MODE": "dryrun",
        "WANDB_RUN_ID": "i",
        "WANDB_PROJECT": "p",
        "WANDB_NAME": "n",
        "WANDB_ENTITY": "e",
        "WANDB_RUN_GROUP": "g",
        "WANDB_RESUME": "must",
        "WANDB_DIR": "w",
    }
    plan = wandb_plan(
        replace(SETTINGS, wandb_mode="disabled", wandb_exp_name="a"), "abc123", {}, environment
    )
    assert (plan.mode, plan.directory) == ("offline", Path("w"))
    assert plan.init == {
        "id": "i",
        "project": "p",
        "name": "n",
        "entity": "e",
        "group": "g",
        "resume": "must",
        "dir": "w",
        "config": {},
    }
