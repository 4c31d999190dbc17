"""Exits with their own parts: exported and imported bit for bit, extracted as ordinary models.

The module that the files come with runs them.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sorted.commands import extract as extract_submodel
from megatron_sorted.conversion.exporting import export_model
from megatron_sorted.conversion.importing import import_model
from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.conversion.origins import RequestedExits
from megatron_sorted.conversion.verifying.comparison import compare
from megatron_sorted.conversion.verifying.nested_logits import nested_exits
from megatron_sorted.conversion.verifying.transformers_states import transformers_exits
from megatron_sorted.conversion.writing import WriteOptions
from megatron_sorted.errors import CheckpointError, SettingsError
from megatron_sorted.evaluation.nested_model import NestedModel, copy_exit, load_nested_model
from tests.support.exit_parts import KINDS, OWN_EXITS, change_config, save_nested
from tests.support.layouts import thinned
from tests.support.model_directories import save_model, tokens

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
DEPTHS = (*OWN_EXITS, 4)


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        for name in one
    )


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float(other.abs().max()) > 1 and float((one - other).abs().max()) <= 1e-5 * float(
        other.abs().max()
    )


def load(directory: Path):
    """Return transformers' model of a directory, of which nothing may be missing or unknown."""
    from transformers import AutoModelForCausalLM

    model, loading_info = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True
    )
    assert not any(
        loading_info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    return model.eval()


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, kind) for family in FAMILIES for kind in ("block", "mlp")),
        ("mistral", "adapter"),
        ("qwen2", "adapter and block"),
        ("qwen3", "adapter and mlp"),
    ],
)
def test_every_computation_of_an_exit_equals_transformers_own_modules(family, kind, tmp_path):
    case = save_nested(
        tmp_path / "origin",
        family,
        kind,
        tied=family == "qwen2",
        norms=family != "llama",
        heads=family == "mistral",
    )
    model = open_model(tmp_path / "origin")
    assert not import_model(model, tmp_path / "runs", RequestedExits()).comparison.problems
    checkpoint = open_model(tmp_path / "runs")
    pairs, ours = {pair.ours: pair for pair in checkpoint.pairs}, case.our_tensors()
    assert same_bits({name: checkpoint.read_ours(pair) for name, pair in pairs.items()}, ours)
    plain = nested_exits(checkpoint.settings, lambda name: ours[name], tokens(), DEPTHS)
    theirs = transformers_exits(model, tokens(), DEPTHS)
    evaluated = load_nested_model(tmp_path / "origin")
    hidden = evaluated.hidden_states(tokens())
    for depth in DEPTHS:
        expected = case.logits(depth, tokens())
        with torch.no_grad():
            given = {
                "plain PyTorch": plain[depth].logits(),
                "transformers, streamed": theirs[depth].logits(),
                "evaluation": evaluated.logits(depth, hidden[depth]),
                "sub-model": evaluated.sub_model(depth)(tokens()).logits,
            }
        for who, logits in given.items():
            assert close(logits, expected), f"{who} at {depth}"
        assert torch.equal(given["evaluation"], given["sub-model"])


@pytest.mark.parametrize("dtype", thinned([torch.float32, torch.bfloat16], torch.bfloat16))
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bitwise(kind, dtype, tmp_path):
    case = save_nested(tmp_path / "origin", "qwen3", kind, tied=True, norms=True, dtype=dtype)
    inward = import_model(
        open_model(tmp_path / "origin"), tmp_path / "runs", RequestedExits()
    ).comparison
    outward = export_model(open_model(tmp_path / "runs"), tmp_path / "back").comparison
    for name in ("model.safetensors", "exits.safetensors"):
        assert same_bits(load_file(tmp_path / "origin" / name), load_file(tmp_path / "back" / name))
    assert same_bits(load_file(tmp_path / "back" / "exits.safetensors"), case.their_tensors())
    for comparison in (inward, outward):
        assert not comparison.problems and [row.depth for row in comparison.exits] == [1, 3, 4]
        assert len(comparison.tensors) == len(case.our_tensors())
    keys = {
        key: value
        for key, value in json.loads((tmp_path / "back" / "config.json").read_text()).items()
        if key.startswith("exit_")
    }
    adapter, block, mlp = KINDS[kind]
    wanted = {
        "exit_layer_indices": [1, 3, 4],
        "exit_block": block,
        "exit_mlp": mlp,
        "exit_adapter_rank": 3 * adapter,
    }
    assert keys == {key: value for key, value in wanted.items() if value}


def test_plain_transformers_loads_the_full_model_and_its_bits(tmp_path):
    case = save_nested(tmp_path / "origin", "llama", "block", norms=True)
    import_model(
        open_model(tmp_path / "origin"),
        tmp_path / "runs",
        RequestedExits(),
        WriteOptions(verify=False),
    )
    export_model(open_model(tmp_path / "runs"), tmp_path / "out", WriteOptions(verify=False))
    model = load(tmp_path / "out")
    assert same_bits(dict(model.state_dict()), dict(case.model.state_dict()))
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, case.model(tokens()).logits)


def test_a_block_wrong_in_both_directions_shows_in_the_logits(tmp_path, monkeypatch):
    from megatron_sorted.conversion.verifying import nested_logits

    save_nested(tmp_path / "origin", "llama", "block")
    after = nested_logits._after_parts
    monkeypatch.setattr(
        nested_logits,
        "_after_parts",
        lambda settings, read, depth, hidden, *more: after(
            settings,
            lambda name: read(name.replace("exit_blocks.1.", "exit_blocks.3.")),
            depth,
            hidden,
            *more,
        ),
    )
    with pytest.raises(CheckpointError, match=r"exit @1: logits differ by up to"):
        import_model(open_model(tmp_path / "origin"), tmp_path / "runs", RequestedExits())
    assert not (tmp_path / "runs").exists()


def test_two_models_that_differ_in_a_block_alone_are_distinguished(tmp_path):
    save_nested(tmp_path / "origin", "llama", "block")
    import_model(open_model(tmp_path / "origin"), tmp_path / "runs", RequestedExits())
    tensors = load_file(tmp_path / "origin" / "exits.safetensors")
    tensors["exits.3.block.self_attn.v_proj.weight"][2, 5] += 0.5
    save_file(tensors, tmp_path / "origin" / "exits.safetensors", {"format": "pt"})
    problems = compare(open_model(tmp_path / "runs"), open_model(tmp_path / "origin")).problems
    assert (
        problems[0].startswith("exit_blocks.3.self_attention.linear_qkv.weight: 1 of ")
        and len(problems) == 2
    )
    assert problems[1].startswith("exit @3: logits differ")


@pytest.mark.parametrize(
    ("family", "kind", "source"),
    [
        ("llama", "block", "hugging face"),
        ("mistral", "block", "checkpoint"),
        ("qwen2", "block", "checkpoint"),
        ("qwen3", "block", "hugging face"),
        ("llama", "mlp", "checkpoint"),
        ("mistral", "mlp", "hugging face"),
        ("qwen2", "mlp", "hugging face"),
        ("qwen3", "mlp", "checkpoint"),
    ],
)
def test_an_exit_becomes_an_ordinary_model_with_the_same_bits(family, kind, source, tmp_path):
    case = save_nested(
        tmp_path / "origin",
        family,
        kind,
        tied=family == "qwen2",
        norms=family in ("mistral", "qwen2"),
        heads=family == "qwen2",
    )
    place = tmp_path / "origin"
    if source == "checkpoint":
        import_model(
            open_model(place), tmp_path / "runs", RequestedExits(), WriteOptions(verify=False)
        )
        place = tmp_path / "runs"
    extract_submodel.main([str(place), f"{tmp_path}/sub", "--all"])
    nested = load_nested_model(tmp_path / "origin")
    for depth in DEPTHS:
        model = load(tmp_path / "sub" / f"depth_{depth}")
        num_layers = depth + (depth < 4)
        assert len(model.model.layers) == num_layers == model.config.num_hidden_layers
        with torch.no_grad():
            given = model(tokens(), use_cache=False).logits
            assert close(given, case.logits(depth, tokens()))
            for module in (nested.model, model):  # the same attention implementation
                module.set_attn_implementation("sdpa")
            assert torch.equal(nested.sub_model(depth)(tokens()).logits, model(tokens()).logits)
        own = load_file(tmp_path / "sub" / f"depth_{depth}" / "model.safetensors")
        o_proj = own[f"model.layers.{num_layers - 1}.self_attn.o_proj.weight"]
        assert bool((o_proj == 0).all()) == (kind == "mlp" and depth < 4)
        config = json.loads((tmp_path / "sub" / f"depth_{depth}" / "config.json").read_text())
        assert config["exit_layer_indices"] == [
            *(exit_depth for exit_depth in OWN_EXITS if exit_depth < depth),
            num_layers,
        ]
        assert config.get(f"exit_{kind}", False) == (depth > 1)
    # the shallower exit of an extracted model is still the exit it was
    inner = load_nested_model(tmp_path / "sub" / "depth_3")
    assert inner.depths == (1, 4)
    with torch.no_grad():
        assert torch.equal(
            inner.sub_model(1)(tokens()).logits, nested.sub_model(1)(tokens()).logits
        )
    card = (tmp_path / "sub" / "depth_3" / "README.md").read_text()
    assert "The first 3 of 4 layers" in card and "`nested_exits.py` of this directory" in card
    assert (tmp_path / "sub" / "depth_3" / "nested_exits.py").is_file() and not (
        tmp_path / "sub" / "depth_1" / "nested_exits.py"
    ).exists()


def test_an_exit_with_an_adapter_is_refused_and_the_full_model_is_not(tmp_path):
    save_nested(tmp_path / "origin", "llama", "adapter and block")
    for which in (["--depth", "1"], ["--all"]):
        with pytest.raises(
            SettingsError,
            match=r"exit 1 reads the hidden state through an adapter of its own .* Use --depth 4",
        ):
            extract_submodel.main([f"{tmp_path}/origin", f"{tmp_path}/sub", *which])
    assert not (tmp_path / "sub").exists()
    extract_submodel.main([f"{tmp_path}/origin", f"{tmp_path}/sub", "--depth", "4"])
    assert (
        load_file(tmp_path / "sub" / "exits.safetensors").keys()
        == load_file(tmp_path / "origin" / "exits.safetensors").keys()
    )


def test_own_norms_at_a_depth_that_another_does_not_pass(tmp_path):
    save_nested(tmp_path / "origin", "llama", "block", norms=True, exits=(2, 3))
    extract_submodel.main([f"{tmp_path}/origin", f"{tmp_path}/sub", "--depth", "2"])
    assert load(tmp_path / "sub").config.num_hidden_layers == 3


ALONE = """\
import json, sys
import torch
from nested_exits import load_nested_exits
ids = torch.tensor(json.loads(sys.argv[1]))
model = load_nested_exits(sys.argv[2], dtype=torch.float32)
result = {"logits": {}, "generated": {}}
for depth in model.depths:
    with torch.no_grad():
        result["logits"][depth] = model(ids, depth=depth).tolist()
    result["generated"][depth] = model.generate(ids[:, :7], depth=depth, max_new_tokens=20).tolist()
config = model.base.generation_config
result["end"], result["fill"] = config.eos_token_id, config.pad_token_id
result["modules"] = [name for name in sys.modules if name.split(".")[0].startswith("megatron")]
print(json.dumps(result))
"""


def ended(
    tokens_bs: torch.Tensor, prompt: int, end: int | None, fill: int | None
) -> list[list[int]]:
    """Return greedy tokens in transformers' form: padding after the end of a text.

    Nothing follows once all texts have ended.
    """
    rows = [
        row[: row.index(end, prompt) + 1] if end in row[prompt:] else row
        for row in tokens_bs.tolist()
    ]
    longest = max(map(len, rows))
    return [row + [end if fill is None else fill] * (longest - len(row)) for row in rows]


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "block"),
        ("mistral", "block"),
        ("qwen2", "mlp"),
        ("qwen3", "adapter and block"),
        ("qwen3", "block"),
        ("mistral", "adapter and mlp"),
    ],
)
def test_the_module_beside_a_model_runs_its_exits_alone(family, kind, tmp_path):
    case = save_nested(
        tmp_path / "origin",
        family,
        kind,
        tied=family == "qwen2",
        norms=family != "llama",
        heads=family == "mistral",
    )
    import_model(
        open_model(tmp_path / "origin"),
        tmp_path / "runs",
        RequestedExits(),
        WriteOptions(verify=False),
    )
    export_model(open_model(tmp_path / "runs"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    (copy_line,) = re.findall(r"`cp (out/nested_exits\.py) \.`", card)
    shutil.copy(tmp_path / copy_line, tmp_path)  # as the card says
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1"
    }
    done = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(tokens().tolist()), "out"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    given = json.loads(done.stdout)
    assert given["modules"] == []
    checkpoint = open_model(tmp_path / "runs")
    pairs = {pair.ours: pair for pair in checkpoint.pairs}
    ours = nested_exits(
        checkpoint.settings, lambda name: checkpoint.read_ours(pairs[name]), tokens(), DEPTHS
    )
    if "adapter" not in kind:
        extract_submodel.main([f"{tmp_path}/out", f"{tmp_path}/sub", "--all", "--no-verify"])
    for depth in DEPTHS:
        logits = torch.tensor(given["logits"][str(depth)])
        assert close(logits, case.logits(depth, tokens())) and close(logits, ours[depth].logits())
        expected = tokens()[:, :7]
        while expected.size(1) < 27:  # without keeping keys and values
            expected = torch.cat([expected, case.logits(depth, expected)[:, -1:].argmax(-1)], 1)
        assert given["generated"][str(depth)] == ended(expected, 7, given["end"], given["fill"])
        if "adapter" not in kind:
            extracted = load(tmp_path / "sub" / f"depth_{depth}")
            extracted.set_attn_implementation("sdpa")
            with torch.no_grad():
                assert torch.equal(extracted(tokens(), use_cache=False).logits, logits)
    assert "from nested_exits import load_nested_exits" in card and "trust_remote_code" in card
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()


BAD = {
    "a tensor is missing": (
        lambda tensors: tensors.pop("exits.3.block.mlp.up_proj.weight"),
        {},
        r"missing: exits\.3\.block\.mlp\.up_proj\.weight",
        r"exits\.3\.block\.mlp\.up_proj\.weight is missing",
    ),
    "another shape": (
        lambda tensors: tensors.update({"exits.1.block.input_layernorm.weight": torch.ones(31)}),
        {},
        r"exits\.1\.block\.input_layernorm\.weight has shape \[31\], "
        r"and config\.json makes it \[32\]",
        r"exits\.1\.block\.input_layernorm\.weight has shape \[31\], the model's own has \[32\]",
    ),
    "one too many": (
        lambda tensors: tensors.update({"exits.2.norm.weight": torch.ones(32)}),
        {},
        r"unknown: exits\.2\.norm\.weight",
        r"exits\.2\.norm\.weight: config\.json declares no such tensor",
    ),
    "block and MLP": (
        lambda tensors: None,
        {"exit_mlp": True},
        "declares exit_block and exit_mlp",
        "declares exit_block and exit_mlp",
    ),
    "another rank": (
        lambda tensors: None,
        {"exit_adapter_rank": 4},
        r"exits\.1\.adapter\.down\.weight has shape \[3, 32\], and config\.json makes it \[4, 32\]",
        r"exits\.1\.adapter\.down\.weight has shape \[3, 32\], the model's own has \[4, 32\]",
    ),
    "a rank above the hidden size": (
        lambda tensors: None,
        {"exit_adapter_rank": 33},
        "exit_adapter_rank is 33; only 0",
        "exit_adapter_rank is 33; only 0",
    ),
    "a word for a block": (
        lambda tensors: None,
        {"exit_block": "yes"},
        "exit_block is 'yes'; only true and false",
        "exit_block is 'yes'; only true and false",
    ),
    "no exits": (
        lambda tensors: None,
        {"exit_layer_indices": None},
        "has no exit_layer_indices",
        "has no exit_layer_indices",
    ),
    "the last layer alone": (
        lambda tensors: None,
        {"exit_layer_indices": [4]},
        "holds the last layer alone",
        "holds the last layer alone",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_stops_with_the_name(what, tmp_path):
    spoil, config, of_conversion, of_evaluation = BAD[what]
    save_nested(tmp_path / "origin", "llama", "adapter and block")
    tensors = load_file(tmp_path / "origin" / "exits.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "origin" / "exits.safetensors", {"format": "pt"})
    change_config(tmp_path / "origin", **config)
    with pytest.raises(CheckpointError, match=of_conversion):
        open_model(tmp_path / "origin")
    with pytest.raises(CheckpointError, match=of_evaluation):
        load_nested_model(tmp_path / "origin")


def test_the_file_of_the_exits_is_missing(tmp_path):
    save_nested(tmp_path / "origin", "llama", "mlp")
    (tmp_path / "origin" / "exits.safetensors").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"norms, heads or parts of their own, but exits\.safetensors is missing",
    ):
        open_model(tmp_path / "origin")
    with pytest.raises(CheckpointError, match=r"own MLPs, but exits\.safetensors is missing"):
        load_nested_model(tmp_path / "origin")


def test_exits_that_would_leave_parts_unused_are_refused(tmp_path):
    save_nested(tmp_path / "origin", "llama", "block")
    with pytest.raises(CheckpointError, match=r"leave exit_blocks\.3\..* unused"):
        import_model(open_model(tmp_path / "origin"), tmp_path / "runs", RequestedExits((1,)))


def test_heads_trained_on_the_layers_leave_the_parts_out(tmp_path):
    from megatron_sorted.evaluation.heads import save_with_heads

    case = save_nested(tmp_path / "origin", "llama", "block")
    plain = load_nested_model(tmp_path / "origin").without_parts()
    with torch.no_grad():
        bare = copy.deepcopy(case)
        bare.exits = {}
        hidden = plain.hidden_states(tokens())
        for depth in DEPTHS:
            assert close(plain.logits(depth, hidden[depth]), bare.logits(depth, tokens()))
    own = {depth: copy_exit(plain.exits[depth]) for depth in OWN_EXITS}
    save_with_heads(
        NestedModel("ICT", plain.model, plain.depths, own), tmp_path / "origin", tmp_path / "heads"
    )
    model = open_model(tmp_path / "heads")
    assert (
        not model.settings.use_exit_block
        and model.settings.use_exit_norm
        and model.settings.untie_exit_output_weights
    )


def test_new_blocks_and_mlps_are_copies_of_the_last_layers(tmp_path):
    from megatron_sorted.commands import convert

    model = save_model(tmp_path / "origin", "qwen2", tied=True)
    last = {
        name.removeprefix("model.layers.3."): tensor
        for name, tensor in model.state_dict().items()
        if ".layers.3." in name
    }
    for kind in ("block", "mlp"):
        convert.main(
            [
                "import",
                f"{tmp_path}/origin",
                f"{tmp_path}/runs_{kind}",
                "--exit-layer-nums",
                "1",
                "3",
                f"--use-exit-{kind}",
            ]
        )
        convert.main(["export", f"{tmp_path}/runs_{kind}", f"{tmp_path}/{kind}"])
    blocks, mlps = (
        load_file(tmp_path / "block" / "exits.safetensors"),
        load_file(tmp_path / "mlp" / "exits.safetensors"),
    )
    assert same_bits(
        blocks,
        {
            f"exits.{depth}.block.{name}": tensor
            for depth in OWN_EXITS
            for name, tensor in last.items()
        },
    )
    mlp = {
        name.replace("post_attention_layernorm", "mlp.norm"): tensor
        for name, tensor in last.items()
        if "mlp" in name or "post" in name
    }
    assert same_bits(
        mlps,
        {f"exits.{depth}.{name}": tensor for depth in OWN_EXITS for name, tensor in mlp.items()},
    )
    for exits, message in (
        (RequestedExits((1,), own_blocks=True, own_mlps=True), "a block has an MLP of its own"),
        (RequestedExits(own_blocks=True), "there is no intermediate exit to have it"),
    ):
        with pytest.raises(SettingsError, match=message):
            import_model(open_model(tmp_path / "origin"), tmp_path / "no", exits)


def test_an_import_never_creates_an_adapter(tmp_path):
    save_nested(tmp_path / "origin", "llama", "adapter")
    with pytest.raises(
        CheckpointError, match=r"no tensor of it can initialize exit_adapters\.2\.down\.weight"
    ):
        import_model(open_model(tmp_path / "origin"), tmp_path / "runs", RequestedExits((1, 2, 3)))
