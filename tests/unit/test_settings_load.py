"""Settings from a file and from flags."""

import dataclasses
import json
import os

import pytest

from megatron_sorted.errors import SettingsError
from megatron_sorted.settings.load import load_settings, settings_as_dict, settings_from_dict
from megatron_sorted.settings.run import Settings


@pytest.fixture
def run_file(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_without_arguments_every_setting_has_its_default():
    assert load_settings([]) == Settings()


def test_flags_override_the_file_and_the_file_overrides_defaults(run_file):
    path = run_file("num-layers: 12\ntrain_iters: 7\nbf16: true\n")
    settings = load_settings(["--train-iters", "9", "--config", path, "--no-swiglu"])
    assert settings == dataclasses.replace(
        Settings(), num_layers=12, train_iters=9, bf16=True, swiglu=False
    )


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--lr", "1e-4"], "lr", 1e-4),
        (["--lr=2"], "lr", 2.0),
        (["--exit-layer-nums", "2", "4"], "exit_layer_nums", (2, 4)),
        (["--exit-layer-nums"], "exit_layer_nums", ()),
        (["--exit-layer-weight", ".1", "1"], "exit_layer_weight", (0.1, 1.0)),
        (["--eval-interval", "5"], "eval_interval", 5),
        (["--eval-interval", "none"], "eval_interval", None),
        (["--save", "None"], "save", None),
        (["--recompute-granularity", "none"], "recompute_granularity", "none"),
        (["--no-load-optim"], "no_load_optim", True),
        (["--no-load-optim", "--load-optim"], "no_load_optim", False),
        (["--bf16", "--no-bf16"], "bf16", False),
        (["--lr", "1", "--lr", "2"], "lr", 2.0),
    ],
)
def test_a_flag_becomes_a_value_of_the_field(arguments, name, value):
    settings = load_settings(arguments)
    assert getattr(settings, name) == value
    assert type(getattr(settings, name)) is type(value)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("lr: 1e-4", "lr", 1e-4),
        ("data-path: [0.3, a, 7, b]", "data_path", ("0.3", "a", "7", "b")),
        ("lr: 1E5", "lr", 1e5),
        ("lr: .5e-3", "lr", 5e-4),
        ("lr: 1", "lr", 1.0),
        ("min-lr: 1.e-5", "min_lr", 1e-5),
        ("exit-layer-nums: [2, 4]", "exit_layer_nums", (2, 4)),
        ("exit_layer_weight: [1, 2.5e-1]", "exit_layer_weight", (1.0, 0.25)),
        ("save: null", "save", None),
        ("save: none", "save", None),
        ("save: 1e4x", "save", "1e4x"),
        ("split: 98,2", "split", "98,2"),
        ("# nothing", "save", None),
    ],
)
def test_a_line_of_the_file_becomes_a_value_of_the_field(run_file, text, name, value):
    settings = load_settings(["--config", run_file(text + "\n")])
    assert getattr(settings, name) == value
    assert [type(part) for part in (value if isinstance(value, tuple) else (value,))] == [
        type(part)
        for part in (
            getattr(settings, name) if isinstance(value, tuple) else (getattr(settings, name),)
        )
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-iter", "3"], "--train-iter: there is no such flag. Did you mean --train-iters?"),
        (["--train_iters=3"], "--train_iters: there is no such flag. Did you mean --train-iters?"),
        (["--no-bf15"], "--no-bf15: there is no such flag. Did you mean --no-bf16?"),
        (["--qqqqqqqq"], "--qqqqqqqq: there is no such flag. See --help for all settings."),
        (
            ["12"],
            "'12': a value without a flag. Write `--name value`; see --help for all settings.",
        ),
        (["--lr"], "Argument --lr: expected one argument. See --help for all settings."),
        (["--lr", "fast"], "--lr: 'fast' is not a value of this setting. Give a number."),
        (["--lr", "nan"], "--lr: nan is not a finite number. Give a finite one."),
        (
            ["--exit-layer-weight", "1", "inf"],
            "--exit-layer-weight: inf is not a finite number. Give a finite one.",
        ),
        (
            ["--num-layers", "2.5"],
            "--num-layers: '2.5' is not a value of this setting. Give a whole number.",
        ),
        (
            ["--num-layers", "none"],
            "--num-layers: 'none' is not a value of this setting. Give a whole number.",
        ),
        (
            ["--save-interval", "x"],
            "--save-interval: 'x' is not a value of this setting. Give a whole number or none.",
        ),
        (
            ["--exit-layer-nums", "2", "x"],
            "--exit-layer-nums: ['2', 'x'] is not a value of this setting. Give a list, each "
            "element a whole number.",
        ),
        (
            ["--optimizer", "adamw"],
            "--optimizer: 'adamw' is not a value of this setting. Did you mean adam? Give one of "
            "adam, sgd, muon.",
        ),
        (
            ["--optimizer", "soap"],
            "--optimizer: 'soap' is not a value of this setting: Megatron-LM has it, but its "
            "steps, its checkpoints and its treatment of output matrices on several stages are "
            "not tested in this program. Give one of adam, sgd, muon.",
        ),
        (
            ["--config", "a", "--config", "b"],
            "--config: given 2 times (a, b). Give one file; flags override it.",
        ),
    ],
)
def test_a_wrong_flag_is_refused_with_a_remedy(arguments, message):
    with pytest.raises(SettingsError) as error:
        load_settings(arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lr: 1e-4\ntrain-iter: 3\n",
            ", line 2, train-iter: there is no such setting. Did you mean train-iters?",
        ),
        ("lr: fast\n", ", line 1, lr: 'fast' is not a value of this setting. Give a number."),
        ("\nlr: '1e-4'\n", ", line 2, lr: '1e-4' is not a value of this setting. Give a number."),
        (
            "num-layers: 8.0\n",
            ", line 1, num-layers: 8.0 is not a value of this setting. Give a whole number.",
        ),
        (
            "num-layers: true\n",
            ", line 1, num-layers: True is not a value of this setting. Give a whole number.",
        ),
        ("bf16: 1\n", ", line 1, bf16: 1 is not a value of this setting. Give true or false."),
        ("save: 7\n", ", line 1, save: 7 is not a value of this setting. Give text or none."),
        (
            "exit-layer-nums: 4\n",
            ", line 1, exit-layer-nums: 4 is not a value of this setting. Give a list, each "
            "element a whole number.",
        ),
        ("lr: .inf\n", ", line 1, lr: inf is not a finite number. Give a finite one."),
        ("lr: 1\nbf16: true\nlr: 2\n", ", line 3: lr is already on line 1. Keep one of the two."),
        (
            "train-iters: 1\ntrain_iters: 2\n",
            ", line 2: train_iters is already on line 1. Keep one of the two.",
        ),
        ("3: 4\n", ", line 1: the key 3 is not text. Keys are names of settings."),
        (
            "- lr\n",
            ": a run is a mapping, this file holds something else. Write one `key: value` a line.",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(run_file, text, message):
    path = run_file(text)
    with pytest.raises(SettingsError) as error:
        load_settings(["--config", path])
    assert str(error.value) == path + message


def test_a_file_that_is_not_yaml_or_not_there_is_refused(run_file, tmp_path):
    with pytest.raises(SettingsError, match=r"run\.yaml: this is not valid YAML .*line 2"):
        load_settings(["--config", run_file("a: [1\n")])
    with pytest.raises(SettingsError, match=r"absent\.yaml: cannot be read"):
        load_settings(["--config", str(tmp_path / "absent.yaml")])
    with pytest.raises(SettingsError, match="Is a directory"):
        load_settings(["--config", str(tmp_path)])


OTHER = {
    "exit_layer_nums": (2, 4),
    "lr": 1e-5,
    "save": 'a "b": #c',
    "load": "true",
    "eval_interval": 3,
    "bf16": True,
    "data_path": ("1e5", "é"),
}


def test_printed_settings_are_the_same_run_again(run_file, capsys):
    settings = dataclasses.replace(Settings(), **OTHER)
    arguments = [
        "--exit-layer-nums",
        "2",
        "4",
        "--lr",
        "1e-5",
        "--save",
        OTHER["save"],
        "--load",
        "true",
        "--eval-interval",
        "3",
        "--bf16",
    ]
    with pytest.raises(SystemExit) as stop:
        load_settings([*arguments, "--data-path", "1e5", "é", "--print-settings"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "\nlr: 1e-05\n" in printed and printed.count("# ") >= 5
    assert len([line for line in printed.splitlines() if line and line[0] != "#"]) == len(
        dataclasses.fields(Settings)
    )
    assert load_settings(["--config", run_file(printed)]) == settings


def test_plain_data_is_the_same_run_again():
    settings = dataclasses.replace(Settings(), **OTHER)
    assert settings_from_dict(json.loads(json.dumps(settings_as_dict(settings)))) == settings
    assert settings_from_dict({"num-layers": 3}).num_layers == 3
    with pytest.raises(
        SettingsError,
        match=r"manifest, num_layer: there is no such setting\. Did you mean num-layers\?",
    ):
        settings_from_dict({"num_layer": 3}, "manifest")


def test_help_names_every_flag_with_its_default_and_ends_well(capsys):
    with pytest.raises(SystemExit) as stop:
        load_settings(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Settings):
        assert f"--{field.name.replace('_', '-')}" in text
        assert field.metadata["help"].split(".")[0][:20] in text
    assert "Peak learning rate. (default: 0.0003)" in text
    assert "Type of normalization. (default: RMSNorm)" in text
    assert "How the work" not in text and "Device and parallel layout" in text


@pytest.mark.parametrize("keys", ["", "world-size: 3\n"])
def test_a_file_that_can_be_read_once_is_read_whole(keys):
    """Read a pipe, as of ``--config <(...)``, also with the comment of files of 0.8 and before."""
    text = f"# world-size: 2\n# A run.\n\n{keys}num-layers: 3\nvocab-size: 100\n"
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    try:
        settings = load_settings(["--config", f"/dev/fd/{reading}"])
    finally:
        os.close(reading)
    assert (settings.num_layers, settings.vocab_size, settings.world_size) == (
        3,
        100,
        3 if keys else 2,
    )
