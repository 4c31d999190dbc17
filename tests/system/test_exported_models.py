"""Exported models as transformers alone sees them: early exits, cut models, sub-models."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sorted.commands import convert
from megatron_sorted.commands import extract as extract_submodel
from tests.support.model_directories import save_model, tokens

DEPTHS = (1, 2, 3, 4)
FAMILIES = {"llama3": False, "qwen2": True, "qwen3": False, "mistral": True}  # family: tied
PROMPTS = [[5, 17, 3], [42, 41, 40, 39, 38, 37, 36], [99]]
OWN_EXITS = (1, 3, 4)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: tiny models are ten times slower where threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(directory: Path, **changes):
    """Return transformers' model of a directory, and what it reports about the files."""
    from transformers import AutoModelForCausalLM

    model, loading_info = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        **changes,
    )
    return model.eval(), loading_info


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module", params=FAMILIES)
def shared(request, tmp_path_factory):
    """Return a model whose exits share norm and head, its export and its extracted sub-models."""
    folder = tmp_path_factory.mktemp(request.param)
    origin = save_model(folder / "origin", request.param, FAMILIES[request.param])
    convert.main(
        [
            "import",
            f"{folder}/origin",
            f"{folder}/runs",
            "--exit-layer-nums",
            "1",
            "2",
            "3",
            "--no-verify",
        ]
    )
    convert.main(["export", f"{folder}/runs", f"{folder}/exported"])
    extract_submodel.main([f"{folder}/exported", f"{folder}/sub", "--all", "--no-verify"])
    return SimpleNamespace(
        family=request.param,
        folder=folder,
        origin=origin,
        exported=folder / "exported",
        sub=folder / "sub",
    )


@pytest.mark.parametrize(
    ("shared", "num_prompts"),
    [("llama3", 3), ("qwen2", 1), ("qwen3", 1), ("mistral", 1)],
    indirect=["shared"],
)
def test_the_full_model_drafts_for_itself_with_the_same_result(shared, num_prompts):
    model, _ = load(shared.exported)
    greedy = {"do_sample": False, "min_new_tokens": 60, "max_new_tokens": 60, "pad_token_id": 0}
    for prompt in PROMPTS[:num_prompts]:
        given = torch.tensor([prompt])
        plain = model.generate(given, **greedy)
        assert plain.shape[1] == len(prompt) + 60
        for depth in DEPTHS[:-1]:
            assert torch.equal(
                model.generate(given, assistant_early_exit=depth, **greedy), plain
            ), f"exit {depth} after {prompt}"


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_cut_model_is_the_extracted_one_bit_for_bit(shared, depth):
    cut, loading_info = load(shared.exported, num_hidden_layers=depth)
    extracted, own_result = load(shared.sub / f"depth_{depth}")
    assert not loading_info["missing_keys"] and not any(
        own_result[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    assert len(extracted.model.layers) == depth == extracted.config.num_hidden_layers
    one, other = cut.state_dict(), extracted.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(logits(cut), logits(extracted))
    if depth == 4:
        assert torch.equal(logits(extracted), logits(shared.origin))


def test_config_keeps_the_exits(shared):
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(shared.exported).exit_layer_indices == [1, 2, 3, 4]
    assert AutoConfig.from_pretrained(shared.sub / "depth_3").exit_layer_indices == [1, 2, 3]


ALONE = """\
import json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
report = {}
for directory in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    with torch.no_grad():
        logits = model(torch.tensor(json.loads(sys.argv[1])), use_cache=False).logits
    report[directory] = logits.tolist()
    report[directory + " exits"] = AutoConfig.from_pretrained(directory).exit_layer_indices
report["modules"] = [name for name in sys.modules if name.split(".")[0].startswith("megatron")]
print(json.dumps(report))
"""


def alone(folder: Path, *directories: Path) -> dict:
    """Return what a fresh process that imports transformers alone reports of directories."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1"
    }
    done = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(tokens().tolist()), *map(str, directories)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def owned(tmp_path_factory):
    """Return directory and checkpoint of a model whose exits have different norms and heads."""
    folder = tmp_path_factory.mktemp("owned")
    save_model(folder / "origin", "qwen3", tied=True)
    (folder / "origin" / "generation_config.json").write_text('{"temperature": 0.7}')
    convert.main(
        [
            "import",
            f"{folder}/origin",
            f"{folder}/copies",
            "--exit-layer-nums",
            *map(str, OWN_EXITS),
            "--use-exit-norm",
            "--untie-exit-output-weights",
            "--no-verify",
        ]
    )
    convert.main(["export", f"{folder}/copies", f"{folder}/nested", "--no-verify"])
    generator = torch.Generator().manual_seed(3)
    own = {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(folder / "nested" / "exits.safetensors").items()
    }
    assert len(own) == 4
    save_file(own, folder / "nested" / "exits.safetensors", {"format": "pt"})
    convert.main(["import", f"{folder}/nested", f"{folder}/runs"])
    for source in ("nested", "runs"):
        extract_submodel.main([f"{folder}/{source}", f"{folder}/sub_{source}", "--all"])
        convert.main(["export", f"{folder}/{source}", f"{folder}/export_{source}", "--no-verify"])
    return SimpleNamespace(folder=folder, nested=folder / "nested", own=own)


def test_transformers_ignores_the_file_of_exits(owned, caplog, capsys):
    model, loading_info = load(owned.nested)
    assert not any(
        loading_info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    assert "exits." not in caplog.text + "".join(capsys.readouterr())
    origin, _ = load(owned.folder / "origin")
    assert torch.equal(logits(model), logits(origin))


@pytest.mark.parametrize("depth", OWN_EXITS)
def test_an_extracted_model_computes_what_its_exit_does(owned, depth):
    model, _ = load(owned.nested)
    states = {}
    hook = model.model.layers[depth - 1].register_forward_hook(
        lambda _module, _inputs, output: states.update(
            hidden=output[0] if isinstance(output, tuple) else output
        )
    )
    full = logits(model)
    hook.remove()
    extracted, loading_info = load(owned.folder / "sub_nested" / f"depth_{depth}")
    assert not any(
        loading_info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    actual = logits(extracted)
    if depth == 4:
        assert torch.equal(actual, full)
        return
    assert extracted.config.tie_word_embeddings is False, "its head is its own now"
    hidden = states["hidden"]
    normed = hidden * torch.rsqrt(
        hidden.square().mean(-1, keepdim=True) + model.config.rms_norm_eps
    )
    expected = (
        normed
        * owned.own[f"exits.{depth}.norm.weight"]
        @ owned.own[f"exits.{depth}.lm_head.weight"].T
    )
    assert float((actual - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert float((actual - full).abs().max()) > 1


def test_a_checkpoint_and_its_directory_give_the_same_files(owned):
    pairs = [(owned.folder / "export_nested", owned.folder / "export_runs")]
    pairs += [
        tuple(owned.folder / f"sub_{source}" / f"depth_{depth}" for source in ("nested", "runs"))
        for depth in OWN_EXITS
    ]
    for one, other in pairs:
        ours, theirs = files_of(one), files_of(other)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == theirs[name], f"{other}: {name}"
    origin, exported = files_of(owned.nested), files_of(owned.folder / "export_runs")
    own = load_file(owned.folder / "export_runs" / "exits.safetensors")
    assert own.keys() == owned.own.keys() and all(
        torch.equal(own[name], owned.own[name]) for name in own
    )
    del (
        origin["exits.safetensors"],
        exported["exits.safetensors"],
    )  # the library orders names in its own way
    assert exported == origin


@pytest.mark.parametrize("shared", ["llama3"], indirect=True)
def test_all_load_in_a_process_that_knows_transformers_alone(shared, owned):
    places = [
        shared.exported,
        shared.sub / "depth_2",
        owned.nested,
        owned.folder / "sub_runs" / "depth_3",
    ]
    report = alone(shared.folder, *places)
    assert report["modules"] == []
    for place in places:
        model, _ = load(place)
        assert torch.equal(torch.tensor(report[str(place)]), logits(model)), place
    assert [report[f"{place} exits"] for place in places] == [
        [1, 2, 3, 4],
        [1, 2],
        [1, 3, 4],
        [1, 3],
    ]
