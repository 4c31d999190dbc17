"""Tuned options belong to a draft model; one draft model serves several models."""

import importlib
import json

import pytest

from megatron_sorted.decoding.network import config_sha256, draft_key, load_network
from megatron_sorted.decoding.requested_strategy import RequestedStrategy
from megatron_sorted.decoding.strategies import EarlyExit, Full, SelfSpeculative, TreeSpeculative
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.decoding.texts import Limits
from megatron_sorted.decoding.tuning.races import Speed
from megatron_sorted.decoding.tuning.tune import Tuning
from megatron_sorted.decoding.tuning.tuned_options import (
    TUNED_FILE,
    WeightsInUse,
    read_tuned_options,
    tuned_dtype,
    write_tuned_options,
)
from megatron_sorted.errors import DataError, SettingsError
from tests.support.decoding import needs_native, plain_network
from tests.support.evaluated import make_model
from tests.unit.test_decoding_text_generator import Letters

TREE = {"depths": [2], "thresholds": [], "num_levels": 3, "num_branches": 2, "num_nodes": 5}
ALONE = {"best": "tree", "strategies": {"full": {}, "tree": TREE}}
BY_SMALL = {
    "best": "self_speculative",
    "strategies": {"self_speculative": {"depth": 1, "num_draft_tokens": 7}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return {name: (directory, network)}; ``twin`` differs from ``small`` in its config alone."""
    folder, by_name = tmp_path_factory.mktemp("models"), {}
    for place, num_layers, more in (
        ("target", 4, {}),
        ("large", 6, {}),
        ("small", 1, {}),
        ("twin/small", 1, {"rms_norm_eps": 1e-5}),
        ("foreign", 1, {"vocab_size": 320}),
    ):
        make_model(num_layers=num_layers, **more).save_pretrained(folder / place)
        by_name[place.split("/")[0]] = (
            folder / place,
            load_network(folder / place, range(1, num_layers + 1)),
        )
    return by_name


def strategy_of(
    models, name: str, draft: str | None = None, strategy: str | None = None, **options
):
    directory, network = models[name]
    choice = RequestedStrategy(directory, draft and models[draft][0], strategy, options)
    return choice.strategy(network, models[draft][1] if draft else None)


def test_the_tuned_strategy_is_that_of_the_given_draft_model(models):
    for name in ("target", "large"):
        directory, key = models[name][0], draft_key(*models["small"])
        assert key == f"small@{config_sha256(models['small'][1])[:16]}"
        write_tuned_options(directory / TUNED_FILE, BY_SMALL, key)
        assert strategy_of(models, name) == Full(), "nothing was tuned without a draft"
        write_tuned_options(directory / TUNED_FILE, ALONE)
        assert strategy_of(models, name) == TreeSpeculative((2,), (), 3, 2, 5)
        assert strategy_of(models, name, "small") == SelfSpeculative(1, 7)
        assert strategy_of(models, name, "small", num_draft_tokens=2) == SelfSpeculative(1, 2)
        assert strategy_of(models, name, "twin", strategy="self_speculative") == SelfSpeculative(
            1, 4
        ), "the default"
        with pytest.raises(SettingsError, match="draft model: full drafts nothing"):
            strategy_of(models, name, "twin")
        with pytest.raises(SettingsError, match="draft model: it has 320 tokens and the model 300"):
            strategy_of(models, name, "foreign", strategy="tree")


def test_options_tuned_with_other_draft_models_stay(tmp_path):
    path = tmp_path / TUNED_FILE
    assert read_tuned_options(path) == read_tuned_options(path, "a@1") == {}
    write_tuned_options(path, BY_SMALL, "a@1")
    write_tuned_options(path, ALONE)
    write_tuned_options(path, {**BY_SMALL, "best": "tree"}, "a@2")
    write_tuned_options(path, {**ALONE, "best": "full"})
    assert read_tuned_options(path, "a@1") == BY_SMALL and read_tuned_options(path, "a@2") == {
        **BY_SMALL,
        "best": "tree",
    }
    assert (
        read_tuned_options(path)["best"] == "full"
        and read_tuned_options(path)["strategies"] == ALONE["strategies"]
    )


def test_a_strategy_without_drafts_does_not_use_the_draft_model(models):
    (directory, network), (small, draft) = models["target"], models["small"]
    choice = RequestedStrategy(directory, small, "tree", {"num_levels": 2})
    generator = TextGenerator(network, Letters(), draft)
    assert choice.named("full").strategy(network, generator.draft_for(Full)) == Full()
    assert isinstance(
        choice.named("early_exit").strategy(network, generator.draft_for(EarlyExit)), EarlyExit
    )
    assert len(list(generator.write([[5, 6]], Full(), max_new_tokens=1))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"format": 1}',
        '{"format": 1, "strategies": {"fast": {}}}',
        '{"format": 1, "strategies": []}',
        '{"format": 1, "best": "fast", "strategies": {}}',
        '{"format": 1, "strategies": {"tree": {"colour": 1}}}',
        '{"format": 1, "strategies": {"tree": []}}',
        '{"format": 1, "best": [], "strategies": {}}',
        '{"format": 2, "strategies": {}}',
        '{"format": 1, "drafts": {"a@1": {}}}',
        '{"format": 1, "drafts": [1]}',
        '{"format": 1, "strategies": {}, "dtype": "int3"}',
        '{"format": 1, "strategies": {}, "dtype": ["int8"]}',
        '{"format": 1, "strategies": {}, "dtype": null}',
        '{"format": 1, "strategies": {}, "native": "yes"}',
        '{"format": 1, "strategies": {}, "machine": "float32"}',
        '{"format": 1, "strategies": {"tree": {"depths": "ab"}}}',
        '{"format": 1, "strategies": {"tree": {"depths": [1, "a"]}}}',
        '{"format": 1, "strategies": {"tree": {"depths": 3}}}',
        '{"format": 1, "strategies": {"tree": {"num_nodes": "many"}}}',
        '{"format": 1, "strategies": {"tree": {"thresholds": [null]}}}',
        '{"format": 1, "strategies": {"tree": {"thresholds": [true]}}}',
        '{"format": 1, "strategies": {"self_speculative": {"depth": 2.5}}}',
        '{"format": 1, "strategies": {"self_speculative": {"num_draft_tokens": true}}}',
        '{"format": 1, "strategies": {}, "others": []}',
        '{"format": 1, "strategies": {}, "others": {"int8 by torch": {}}}',
        '{"format": 1, "strategies": {}, "others": {"int3 by torch": {"strategies": {}}}}',
        '{"format": 1, "strategies": {}, "others": {"a": {"strategies": {}, "dtype": "int8"}}}',
        '{"format": 1, "strategies": {}, "machine": {"dtype": 3}}',
        '{"format": 1, "strategies": {}, "machine": {"threads": "2"}}',
    ],
)
def test_a_damaged_file_is_refused_and_left_as_it_is(tmp_path, text):
    path = tmp_path / TUNED_FILE
    path.write_text(text)
    for work in (lambda: read_tuned_options(path), lambda: write_tuned_options(path, ALONE)):
        with pytest.raises(DataError, match=r"decoding\.json: .* Remove it and tune again"):
            work()
    assert path.read_text() == text


INT8 = "in int8 by the compiled library"


@pytest.mark.parametrize(
    ("tuned", "note"),
    [
        ({}, None),
        ({"dtype": "int8", "native": True}, None),
        ({"dtype": "int8", "native": True, "machine": {"dtype": "bfloat16"}}, None),
        ({"dtype": "float32", "native": True}, ("in float32 by the compiled library", INT8)),
        ({"dtype": "int8", "native": False}, ("in int8 by torch", INT8)),
        # of an earlier version
        ({"machine": {"dtype": "float32"}}, ("in float32 by torch", INT8)),
        ({"machine": {"threads": 999}}, ("with 999 threads", "with 1")),
        (
            {"dtype": "bfloat16", "native": True, "machine": {"threads": 999}},
            ("in bfloat16 by the compiled library with 999 threads", f"{INT8} with 1"),
        ),
    ],
)
@needs_native
def test_options_of_other_weights_are_used_with_a_note(tuned, note, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megatron_sorted.decoding.native.choice._reported", set())
    monkeypatch.setattr("megatron_sorted.decoding.requested_strategy.native_threads", lambda: 1)
    _, network = plain_network("llama", kind="int8")
    write_tuned_options(tmp_path / TUNED_FILE, {**ALONE, **tuned})
    choice = RequestedStrategy(tmp_path)
    for _ in range(2):
        assert choice.strategy(network) == TreeSpeculative((2,), (), 3, 2, 5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(note)
    if note:
        assert f"was measured {note[0]}, and the model runs {note[1]}: other opt" in lines[0]
        assert lines[0].endswith(f"megatron-sorted tune {tmp_path} --dtype int8")
    monkeypatch.setattr("megatron_sorted.decoding.native.choice._reported", set())
    choice.named("self_speculative").strategy(network)  # nothing is tuned for it
    assert not capsys.readouterr().err


def test_a_tuned_kind_of_weights_is_named_by_new_files_alone(tmp_path):
    path = tmp_path / TUNED_FILE
    assert tuned_dtype(path) is None
    write_tuned_options(path, {**BY_SMALL, "dtype": "int8", "native": True}, "a@1")
    assert tuned_dtype(path) is None, "that of a draft model"
    write_tuned_options(path, {**ALONE, "machine": {"dtype": "bfloat16"}})
    assert tuned_dtype(path) is None, "earlier versions wrote float32 where none was asked for"
    write_tuned_options(path, {**ALONE, "dtype": "bfloat16", "native": True})
    assert tuned_dtype(path) == "bfloat16"


def test_options_tuned_with_several_kinds_of_weights_stand_beside_each_other(tmp_path):
    path, kinds = tmp_path / TUNED_FILE, [("float32", True), ("int8", True), ("float32", False)]
    for key in (None, "a@1"):
        for number, (kind, is_native) in enumerate(kinds):
            more = {"dtype": kind, "native": is_native}
            write_tuned_options(path, {**ALONE, "number": number, **more}, key)
        for number, weights in enumerate(kinds):
            assert read_tuned_options(path, key, WeightsInUse(*weights))["number"] == number
        newest = read_tuned_options(path, key, WeightsInUse("bfloat16", True))
        assert newest == read_tuned_options(path, key) and newest["number"] == 2
        # again, with the kind that was measured first
        write_tuned_options(path, {**ALONE, "number": 9, "dtype": "float32", "native": True}, key)
        parts = [read_tuned_options(path, key, WeightsInUse(*weights)) for weights in kinds]
        assert [part["number"] for part in parts] == [9, 1, 2]
        assert not any("others" in part for part in parts)
    assert tuned_dtype(path) == "float32", "the kind of the newest options is the default"
    whole = json.loads(path.read_text())
    assert (
        set(whole["others"])
        == set(whole["drafts"]["a@1"]["others"])
        == {"int8 by the compiled library", "float32 by torch"}
    )


@needs_native
def test_each_kind_of_weights_has_its_own_options(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megatron_sorted.decoding.native.choice._reported", set())
    depths = {"float32": 1, "int8": 2}
    for kind, depth in depths.items():
        options = {"self_speculative": {"depth": depth, "num_draft_tokens": 3}}
        tuned = {"best": "self_speculative", "strategies": options, "dtype": kind, "native": True}
        write_tuned_options(tmp_path / TUNED_FILE, tuned)
    for kind, depth in depths.items():
        _, network = plain_network("llama", kind=kind)
        assert RequestedStrategy(tmp_path).strategy(network) == SelfSpeculative(depth, 3)
    assert not capsys.readouterr().err


def test_a_draft_model_that_makes_the_model_slower_does_not_draft(models, capsys, monkeypatch):
    monkeypatch.setattr("megatron_sorted.decoding.native.choice._reported", set())
    file = models["target"][0] / TUNED_FILE
    write_tuned_options(file, {**BY_SMALL, "best": "full"}, draft_key(*models["small"]))
    assert strategy_of(models, "target", "small") == Full()
    assert "small makes this model slower here, so it does not draft" in capsys.readouterr().err
    assert strategy_of(models, "target", "small", "self_speculative") == SelfSpeculative(1, 7)
    file.unlink()


@needs_native
def test_tuning_keeps_the_kind_of_weights_with_the_costs(tmp_path, capsys):
    path = tmp_path / TUNED_FILE
    for kind, is_native in (("torch", False), ("int8", True)):
        generator = TextGenerator(plain_network("llama", kind=kind)[1], Letters())
        tuning = Tuning(generator, None, [1], [[5, 6, 7]], Limits(4))
        tuning.choices = {"full": Full(), "self_speculative": SelfSpeculative(1, 2)}
        tuning.speeds = {"full": Speed(2.0, 1.0), "self_speculative": Speed(1.0, 2.0)}
        assert tuning.keep(path, {"device": "cpu"}) == "full", "speculation does not pay"
        tuned = read_tuned_options(path)
        assert (tuned["dtype"], tuned["native"]) == (generator.network.kind, is_native)
        assert set(tuned["costs"]) == {"widths", "layers", "heads", "blocks", "drafts", "host"}
        assert tuned["machine"]["threads"] >= 1 and tuned["machine"]["processor"]
        assert ("instructions" in tuned["machine"]) == is_native
    torch_options = read_tuned_options(path, None, WeightsInUse("float32", False))
    assert torch_options["dtype"] == "float32", "the second tuning threw the first one away"


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("self_speculative", {"depth": 2, "num_draft_tokens": 10**9}, "is not in 1..64"),
        ("self_speculative", {"depth": 77}, "depth 77 is no exit|depth 77 is the full"),
        ("tree", {**TREE, "num_nodes": 10**9}, "num_nodes: 1000000000 is not in 1..512"),
        ("early_exit", {"depths": [2], "thresholds": [1e9]}, "is not in 0..1"),
        ("sorted_speculative", {"depths": [], "thresholds": []}, "no exit is named"),
    ],
)
def test_tuned_options_that_do_not_fit_the_model_are_refused(models, name, options, rule):
    file = models["large"][0] / TUNED_FILE
    file.write_text(json.dumps({"format": 1, "best": name, "strategies": {name: options}}))
    with pytest.raises(DataError, match=rf"decoding\.json: its options .*({rule})") as caught:
        strategy_of(models, "large")
    assert "\n" not in str(caught.value) and str(caught.value).endswith("and tune again.")
    file.unlink()


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (
            "megatron_sorted.commands.generate",
            ["m", "--prompt", "a", "--max-new-tokens", "0"],
            "--max-new-tokens: 0 is not 1 or more",
        ),
        (
            "megatron_sorted.commands.generate",
            ["m", "--prompt", "a", "--threads", "-1"],
            "--threads: -1 is not 1 or more",
        ),
        (
            "megatron_sorted.commands.tune",
            ["m", "--prompt-file", "f", "--num-prompts", "0"],
            "--num-prompts: 0 is not",
        ),
        (
            "lab.prove_decoding",
            ["m", "--prompt-file", "f", "--most-prompt-tokens", "0"],
            "--most-prompt-tokens: 0 is not",
        ),
        (
            "megatron_sorted.commands.benchmark",
            ["m", "--questions", "f", "--per-group", "0"],
            "--per-group: 0 is not",
        ),
    ],
)
def test_counts_of_nothing_are_refused_before_a_model_is_read(module, arguments, message):
    with pytest.raises(SettingsError, match=message):
        importlib.import_module(module).main(arguments)
