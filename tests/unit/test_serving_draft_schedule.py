"""Drafts scheduled by load: the formula, the schedule and its place in decoding.json."""

import json
from pathlib import Path

import pytest

from megatron_sorted.commands.options.engine_tuning import acceptance_of, drafting_exit
from megatron_sorted.commands.tune import main as tune
from megatron_sorted.decoding.tuning.tuned_options import (
    read_draft_schedule,
    read_tuned_options,
    write_draft_schedule,
    write_tuned_options,
)
from megatron_sorted.errors import DataError, SettingsError
from megatron_sorted.serving.vllm.draft_schedule import (
    StepCosts,
    best_length,
    draft_schedule,
    expected_tokens,
    speed_up,
)
from tests.support.vllm_records import TUNED, installation, nested_directory


@pytest.fixture
def model(tmp_path) -> Path:
    """Return a directory of a nested model."""
    return nested_directory(tmp_path / "model")


@pytest.fixture
def vllm(tmp_path, monkeypatch) -> Path:
    """Return a folder that holds the record of an installed vLLM."""
    return installation(tmp_path / "site", monkeypatch)


# costs in seconds: one text waits for weights, four texts for arithmetic
COSTS = StepCosts(
    plain={1: 1.0, 4: 1.0},
    drafting={1: 0.25, 4: 0.5},
    verifying={1: {1: 1.0, 2: 1.0, 4: 1.0}, 4: {1: 1.5, 2: 2.0, 4: 3.0}},
)


def test_the_expected_tokens_are_the_sum_of_a_geometric_series():
    """Against the closed form of equation 1, and two limits."""
    for share in (0.1, 0.5, 0.9):
        for length in (1, 2, 7):
            closed = (1 - share ** (length + 1)) / (1 - share)
            assert expected_tokens(share, length) == pytest.approx(closed, rel=1e-12)
    assert expected_tokens(0.5, 0) == 1.0 and expected_tokens(1.0, 3) == 4.0


def test_speeds_and_schedules_are_those_computed_by_hand():
    # a = 0.5: 1.5, 1.75 and 1.9375 tokens for drafts of 1, 2, 4
    # one text: 1.25, 1.5 and 2.0 seconds against 1.0
    assert [speed_up(COSTS, 0.5, 1, n) for n in (1, 2, 4)] == pytest.approx(
        [1.5 / 1.25, 1.75 / 1.5, 1.9375 / 2.0]
    )
    # four texts: 2.0, 3.0 and 5.0 seconds against 1.0: no draft pays
    assert speed_up(COSTS, 0.5, 4, 1) == pytest.approx(0.75)
    # two texts, a third of the way: 1.25 + (2.0 - 1.25) / 3 seconds; three texts: 1.75
    assert speed_up(COSTS, 0.5, 2, 1) == pytest.approx(1.5 / 1.5)
    assert speed_up(COSTS, 0.5, 3, 1) == pytest.approx(1.5 / 1.75)
    assert draft_schedule(COSTS, 0.5) == ((1, 1, 1), (2, 4, 0))
    # a = 0.9: 1.9, 2.71 and 4.0951 tokens; one text 1.52, 1.81, 2.05 times as fast as plain,
    # four texts 0.95, 0.90, 0.82; two texts in 1.5, 2.0, 3.0 seconds: 1.27, 1.36, 1.37;
    # three texts in 1.75, 2.5, 4.0 seconds: 1.09, 1.08, 1.02
    assert draft_schedule(COSTS, 0.9) == ((1, 2, 4), (3, 3, 1), (4, 4, 0))


def test_a_gain_within_the_noise_is_no_gain():
    costs = StepCosts({1: 1.0}, {1: 0.0}, {1: {1: 1.49}})  # 1.5 tokens: 1.007 times as fast
    assert speed_up(costs, 0.5, 1, 1) > 1 and best_length(costs, 0.5, 1) == 0
    costs = StepCosts({1: 1.0}, {1: 0.0}, {1: {1: 1.45}})  # 1.034 times
    assert best_length(costs, 0.5, 1) == 1


def test_beyond_the_measured_sizes_time_grows_with_them():
    assert COSTS.seconds(8, 1) == pytest.approx(4.0) and COSTS.seconds(8, 0) == 2.0


def test_a_schedule_survives_with_all_else_of_the_file(model):
    path = model / "decoding.json"
    path.write_text(json.dumps(TUNED))
    other = {**TUNED, "dtype": "int8", "best": "full"}
    write_tuned_options(path, other)
    write_tuned_options(path, {"strategies": {"full": {}}}, "small@1")
    before = json.loads(path.read_text())
    measured = {"acceptance": 0.8, "schedule": [[1, 4, 3], [5, 8, 0]], "steps": []}
    write_draft_schedule(path, "vllm", 2, measured)
    write_draft_schedule(path, "vllm", 1, {**measured, "schedule": [[1, 8, 0]]})
    whole = json.loads(path.read_text())
    assert read_draft_schedule(path, "vllm", 2) == measured
    assert read_draft_schedule(path, "vllm", 1)["schedule"] == [[1, 8, 0]]
    assert read_draft_schedule(path, "vllm", 4) == {}
    assert whole.pop("engines").keys() == {"vllm"} and whole == before
    # our own tuning keeps it in turn, alone and with another model that drafts
    write_tuned_options(path, TUNED)
    write_tuned_options(path, {"strategies": {"full": {}}}, "small@2")
    assert read_draft_schedule(path, "vllm", 2) == measured
    assert read_tuned_options(path)["best"] == "self_speculative"
    assert {"small@1", "small@2"} == json.loads(path.read_text())["drafts"].keys()


def test_a_file_may_hold_a_schedule_alone(tmp_path):
    write_draft_schedule(tmp_path / "a.json", "vllm", 2, {"schedule": [[1, 1, 1]]})
    assert read_draft_schedule(tmp_path / "a.json", "vllm", 2) == {"schedule": [[1, 1, 1]]}
    assert read_tuned_options(tmp_path / "a.json").get("strategies") is None


@pytest.mark.parametrize(
    "schedule",
    [[], [[2, 4, 1]], [[1, 4, 1], [6, 8, 0]], [[1, 0, 1]], [[1, 4, 65]], [[1, 4]], [[1, 4, True]]],
    ids=str,
)
def test_a_damaged_schedule_is_refused(tmp_path, schedule):
    path = tmp_path / "decoding.json"
    path.write_text(json.dumps({**TUNED, "engines": {"vllm": {"2": {"schedule": schedule}}}}))
    with pytest.raises(DataError, match="not written by megatron-sorted tune"):
        read_draft_schedule(path, "vllm", 2)


def test_tuning_needs_our_own_records(model, vllm):
    with pytest.raises(SettingsError, match=r"it names no exit that drafts. Give --exit-layer"):
        drafting_exit(model, None)
    assert drafting_exit(model, 1) == 1
    with pytest.raises(DataError) as failure:
        tune([str(model), "--engine", "vllm", "--exit-layer", "2"])
    assert "no share of tokens that exit 2 has in common" in str(failure.value)
    assert f"megatron-sorted tune {model} --prompt-file FILE" in str(failure.value)
    (model / "decoding.json").write_text(json.dumps(TUNED))
    assert drafting_exit(model, None) == 2 and acceptance_of(model, 2) == 0.8
    with pytest.raises(SettingsError, match="depths: 3 is no exit of"):
        tune([str(model), "--engine", "vllm", "--exit-layer", "3"])
    with pytest.raises(SettingsError, match="--pipeline-parallel-size 2"):
        tune([str(model), "--engine", "vllm", "--", "-pp", "2"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--engine vllm --prompt-file a", "--prompt-file: it has no effect with --engine vllm"),
        ("--engine vllm --num-draft-tokens 17", "--num-draft-tokens: 17 is not in 1..16"),
        ("--engine vllm --max-num-seqs 0", "--max-num-seqs: 0 is not in 1..1024"),
        ("--prompt-file a --max-num-seqs 8", "--max-num-seqs: it has no effect without --engine"),
        ("--prompt-file a --exit-layer 1", "--exit-layer: it has no effect without --engine"),
    ],
)
def test_options_of_tuning_that_do_not_fit_are_refused(model, arguments, message):
    with pytest.raises(SettingsError) as failure:
        tune([str(model), *arguments.split()])
    assert str(failure.value).startswith(message)
