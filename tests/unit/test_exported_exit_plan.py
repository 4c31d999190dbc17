"""The exits of a directory, and directories that contradict themselves."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sorted.conversion.importing import import_model
from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.conversion.origins import RequestedExits
from megatron_sorted.conversion.writing import WriteOptions
from megatron_sorted.errors import CheckpointError, SettingsError
from megatron_sorted.exported.checkpoint_as_directory import as_hugging_face_directory
from megatron_sorted.exported.exit_plan import plan_exits
from tests.support.model_directories import save_model


def directory_with(path, **config):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_hidden_layers": 6, **config})
    )
    save_file(
        {f"tensor {number}": torch.zeros(1) for number in range(6)}, path / "model.safetensors"
    )
    return path


def test_depths(tmp_path):
    plain = directory_with(tmp_path)
    assert plan_exits(plain).depths == (1, 2, 3, 4, 5, 6) and plan_exits(plain, [4, 2]).depths == (
        2,
        4,
        6,
    )
    nested = directory_with(tmp_path, exit_layer_indices=[2, 4])
    assert plan_exits(nested).depths == (2, 4, 6) and plan_exits(nested, [3]).depths == (3, 6)
    (tmp_path / "exits.safetensors").touch()
    own = directory_with(
        tmp_path, exit_layer_indices=[2, 4, 6], own_exit_norms=True, tie_exit_lm_head=True
    )
    plan = plan_exits(own)
    assert (plan.own, plan.num_layers) == (("norms",), 6)
    with pytest.raises(
        SettingsError, match=r"no norms of its own for depth 3\. Use some of 2, 4, 6"
    ):
        plan_exits(own, [3])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported. Supported are llama"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None where a number above 0"),
        (
            {"exit_layer_indices": [2, 9]},
            r"exit_layer_indices \[2, 9\]: .* 9 is not a layer of this model",
        ),
        ({"exit_layer_indices": [2, 2]}, "2 is listed more than once"),
        ({"exit_layer_indices": []}, "not a list of depths"),
        ({"own_exit_norms": True}, "has no exit_layer_indices"),
        (
            {"own_exit_norms": True, "exit_layer_indices": [2]},
            "own norms, but exits.safetensors is missing",
        ),
    ],
)
def test_contradictory_configs_are_refused(tmp_path, config, message):
    with pytest.raises(CheckpointError, match=message):
        plan_exits(directory_with(tmp_path, **config))


def test_other_directories_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        as_hugging_face_directory(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"neither a Hugging Face model \(config\.json"):
        as_hugging_face_directory(tmp_path)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"its weights are pickled \(pytorch_model\.bin\)"):
        as_hugging_face_directory(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        plan_exits(tmp_path)
    assert as_hugging_face_directory(directory_with(tmp_path)) == tmp_path
    (tmp_path / "iter_0000010").mkdir()
    assert as_hugging_face_directory(tmp_path) == tmp_path


def test_a_checkpoint_is_exported_to_a_temporary_directory(tmp_path):
    save_model(tmp_path / "origin", "qwen3")
    import_model(
        open_model(tmp_path / "origin"),
        tmp_path / "checkpoints",
        RequestedExits((2,)),
        WriteOptions(verify=False),
    )
    exported = as_hugging_face_directory(tmp_path / "checkpoints")
    assert plan_exits(exported).depths == (2, 4)
    one, other = (
        load_file(place / "model.safetensors") for place in (exported, tmp_path / "origin")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
